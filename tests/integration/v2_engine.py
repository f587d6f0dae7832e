"""The engine that GPUs run, on a CPU: `python -m tests.integration.v2_engine REQUEST.json ANSWER.json`.

vLLM's V2 model runner and asynchronous scheduler (see `v2_on_cpu`) with adaptive speculation, K drawn anew at each
step. REQUEST: {"model", "drafter", "max_tokens", "prompts": [[token ids]]}; ANSWER: {"answers", "report", "steps",
"drafts": how many times the drafter ran, "scheduler", "runner", "speculator"}.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tests.integration.v2_on_cpu import let_vllm_schedule_ahead, let_vllm_use_triton

CHOICES = (0, 3, 7)
WORKER = "tests.integration.v2_worker.AdaptiveV2CPUWorker"


def main() -> None:
    let_vllm_use_triton()
    let_vllm_schedule_ahead()
    from vllm import LLM, SamplingParams

    from dflash_serve.settings.translate import ADAPTIVE_SCHEDULER
    from dflash_serve.speculation.config import AdaptiveConfig, batch_size_schedule
    from dflash_serve.speculation.step_cost import generic

    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        speculative_config={
            "method": "dflash",
            "model": request["drafter"],
            "num_speculative_tokens": CHOICES[-1],
            "num_speculative_tokens_per_batch_size": batch_size_schedule(CHOICES, 4),
        },
        scheduler_cls=ADAPTIVE_SCHEDULER,
        worker_cls=WORKER,
        additional_config=AdaptiveConfig(CHOICES, generic()).to_additional(),
    )
    engine: Any = llm.llm_engine
    controller = engine.engine_core.engine_core.scheduler.draft_length
    numbers = random.Random(0)
    controller.choose = lambda requests, now: numbers.choice(CHOICES)
    runner = engine.model_executor.driver_worker.worker.model_runner
    drafted: list[int] = []
    generate = runner.speculator._generate_draft

    def count(*args: Any, **kwargs: Any) -> None:
        drafted.append(1)
        generate(*args, **kwargs)

    runner.speculator._generate_draft = count
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"])
    answers = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]
    steps = controller.report()["steps_by_draft_tokens"]
    result = {
        "answers": answers,
        "report": controller.report(),
        "steps": sum(steps.values()),
        "drafts": len(drafted),
        "scheduler": type(engine.engine_core.engine_core.scheduler).__name__,
        "runner": type(runner).__mro__[1].__module__,
        "speculator": type(runner.speculator).__name__,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
