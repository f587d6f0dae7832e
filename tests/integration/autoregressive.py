"""The same engine without a drafter: `python -m tests.integration.autoregressive REQUEST.json ANSWER.json`.

REQUEST: {"model", "max_tokens", "prompts": [[token ids]], "regex": null or the grammar of a second run}; ANSWER:
{"answers": [[token ids]], "regex": the same of the second run}. A process of its own, as the test must not hold a
second engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(model=request["model"], dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=16)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in request["prompts"]]

    def answers(**options: Any) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], **options)
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]

    result = {"answers": answers()}
    if request.get("regex"):
        result["regex"] = answers(structured_outputs=StructuredOutputsParams(regex=request["regex"]))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
