"""Every draft of an in-process engine as it is made, in vLLM's V1 and V2 model runners.

Set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vllm is imported, and run one request at a time: a draft is then told by
its position.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Draft:
    position: int
    """Tokens of context: the bonus token's position."""
    bonus_token: int
    tokens: list[int]
    """[num_draft_tokens], for the positions after the bonus token's."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def record_drafts(llm: Any) -> list[Draft]:
    """A list that grows by one entry for each block that the engine of `llm` (vllm.LLM) drafts from now on."""
    drafts: list[Draft] = []

    def install(worker: Any) -> None:
        runner = worker.model_runner
        proposer = getattr(runner, "speculator", None) or runner.drafter
        propose = proposer.propose
        signature = _signature(proposer)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            # our V2 worker, where it leaves the block out, returns old drafts
            if given.get("dummy_run") or not getattr(proposer, "draft_is_wanted", True):
                return propose(*args, **kwargs)
            if "input_batch" in given:  # V2
                batch = given["input_batch"]
                position = int(batch.seq_lens[0] - given["num_rejected"][0])
                bonus = int(given["last_sampled"][batch.idx_mapping[0]])
            else:
                rejected = given.get("num_rejected_tokens_gpu")
                position = int(given["common_attn_metadata"].seq_lens[0])
                position -= int(rejected[0]) if rejected is not None else 0
                bonus = int(given["next_token_ids"][0])
            tokens = propose(*args, **kwargs)
            # and our V1 worker none
            if tokens.shape[1]:
                drafts.append(Draft(position, bonus, tokens[0].tolist()))
            return tokens

        proposer.propose = recorded

    llm.collective_rpc(install)
    return drafts


def _signature(proposer: Any) -> inspect.Signature:
    """That of vLLM's own `propose`: our workers' subclasses name some of its arguments and hand on the rest."""
    for owner in type(proposer).__mro__:
        if "propose" in vars(owner):
            signature = inspect.signature(vars(owner)["propose"].__get__(proposer))
            if not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
                return signature
    raise TypeError(f"no class of {type(proposer).__name__} names the arguments of `propose`")
