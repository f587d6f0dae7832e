"""The same engine without a drafter: `python -m tests.integration.autoregressive REQUESTS.json ANSWERS.json`.

REQUESTS: {"model", "max_tokens", "prompts": [[token ids]]}; ANSWERS: [[token ids]]. A process of its own, as the test
must not hold a second engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams

    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(model=request["model"], dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=16)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"])
    answers = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
