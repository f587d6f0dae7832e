"""The engine with the draft length chosen at each step: `python -m tests.integration.adaptive_engine REQUEST ANSWER`.

REQUEST: {"model", "drafter", "max_tokens", "prompts": [[token ids]], "regex", "random": whether K is drawn anew at each
step instead of chosen}. Its KV cache holds less than what the batch wants, so that requests are preempted. ANSWER holds
the output of each way of asking, and what was seen on the way.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHOICES = (0, 1, 2, 3, 5, 7)
AT_ONCE = 6
BLOCKS = 20
"""Of 32 tokens, one of them vLLM's own: six requests of some 150 prompt and 48 output tokens do not fit, though they
share a prefix."""


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from dflash_serve.settings.translate import ADAPTIVE_CPU_WORKER, ADAPTIVE_SCHEDULER
    from dflash_serve.speculation.config import AdaptiveConfig, batch_size_schedule
    from dflash_serve.speculation.step_cost import generic

    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=AT_ONCE,
        max_num_batched_tokens=2048,
        block_size=32,
        num_gpu_blocks_override=BLOCKS,
        speculative_config={
            "method": "dflash",
            "model": request["drafter"],
            "num_speculative_tokens": CHOICES[-1],
            "num_speculative_tokens_per_batch_size": batch_size_schedule(CHOICES, AT_ONCE),
        },
        scheduler_cls=ADAPTIVE_SCHEDULER,
        worker_cls=ADAPTIVE_CPU_WORKER,
        additional_config=AdaptiveConfig(CHOICES, generic()).to_additional(),
    )
    engine: Any = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    controller = scheduler.draft_length
    if request["random"]:
        numbers = random.Random(0)
        controller.choose = lambda requests, now: numbers.choice(CHOICES)
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def count(victim: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(victim.request_id)
        preempt(victim, *args, **kwargs)

    scheduler._preempt_request = count
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in request["prompts"]]

    def sampling(**options: Any) -> Any:
        return SamplingParams(temperature=0, max_tokens=request["max_tokens"], **options)

    def tokens(outputs: Iterable[Any]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in outputs]

    result: dict[str, Any] = {"answers": tokens(llm.generate(prompts, sampling(), use_tqdm=False))}
    again = llm.generate(prompts, sampling(), use_tqdm=False)
    result["again"] = tokens(again)
    result["cached_tokens"] = sum(output.num_cached_tokens or 0 for output in again)
    if request.get("regex"):
        grammar = StructuredOutputsParams(regex=request["regex"])
        result["regex"] = tokens(llm.generate(prompts, sampling(structured_outputs=grammar), use_tqdm=False))
    result["beside_aborted"] = _beside_aborted(engine, prompts, sampling())
    result["preemptions"] = len(preempted)
    result["report"] = controller.report()
    result["free_blocks"] = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    Path(sys.argv[2]).write_text(json.dumps(result))


def _beside_aborted(engine: Any, prompts: list[Any], sampling: Any) -> dict[str, list[int]]:
    """Every second request is aborted in mid-answer; the outputs of the others, by index."""
    # vLLM gives requests names of its own inside, and answers to ours
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, sampling)
    outputs: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 8:
            engine.abort_request([str(index) for index in range(0, len(prompts), 2)])
    return {name: ids for name, ids in outputs.items() if int(name) % 2}


if __name__ == "__main__":
    main()
