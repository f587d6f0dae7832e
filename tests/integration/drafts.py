"""An engine's drafts: `python -m tests.integration.drafts REQUESTS.json ANSWERS.json`.

REQUESTS: {"engine": arguments of vllm.LLM, "sampling": of SamplingParams, "prompts": [[token ids]], "v2": whether the
V2 model runner is to run, "pad_groups": whether KV cache groups are to be few, padded where they must}.
ANSWERS: one entry a prompt, in turn: {"output", "cached_tokens", "drafts": see `benchmarks.draft_recorder.Draft`}.
A process of its own, because which plugins vLLM loads is settled when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.integration.v2_on_cpu import let_vllm_use_triton


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    if request["v2"]:
        let_vllm_use_triton()
    from vllm import LLM, SamplingParams

    from benchmarks.draft_recorder import record_drafts
    from dflash_serve import kv_groups

    if request["pad_groups"]:
        kv_groups.MANY_GROUPS, kv_groups.MOST_PADDING = 1, 10.0
    llm = LLM(**request["engine"])
    drafts = record_drafts(llm)
    answers = []
    for prompt in request["prompts"]:
        drafts.clear()
        prompts: list[Any] = [{"prompt_token_ids": prompt}]
        (answer,) = llm.generate(prompts, SamplingParams(**request["sampling"]), use_tqdm=False)
        answers.append(
            {
                "output": list(answer.outputs[0].token_ids),
                "cached_tokens": answer.num_cached_tokens or 0,
                "drafts": [draft.to_json() for draft in drafts],
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
