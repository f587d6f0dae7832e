"""vLLM on a CPU at a GPU's pace: all of the engine but the model, whose steps take a GPU's time and no CPU.

What the front end costs shows on a laptop then as it does beside a GPU: the API, scheduler, detokeniser and parsers are
vLLM's own. Every answer is the vocabulary's first token again and again. `benchmarks.front_end_paced` uses it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from benchmarks.pace import BUSY_VARIABLE, PACE, keep_busy
from dflash_serve.speculation.step_cost import StepCosts, load

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class InProcessExecutor(UniProcExecutor):
    """vLLM's, under another name."""


class Lengths:
    """How far each request is, of its prompt."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}

    def answered(self, scheduled: SchedulerOutput) -> dict[str, bool]:
        """The step's requests, in its order, and whether each gives a token: its prompt is read by then."""
        for request in scheduled.finished_req_ids:
            self._prompts.pop(request, None)
        cached = scheduled.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            self._prompts[new.req_id] = len(new.prompt_token_ids or ())
            computed[new.req_id] = new.num_computed_tokens
        return {
            request: computed[request] + tokens >= self._prompts[request]
            for request, tokens in scheduled.num_scheduled_tokens.items()
        }


def step_seconds(costs: StepCosts, requests: int, tokens: int) -> float:
    """Of a step without drafts: one token a request, the rest of them prompts'."""
    return costs.step_seconds(requests, 0) + costs.token_seconds * max(tokens - requests, 0)


class PacedWorker(CPUWorker):
    """Sleeps where vLLM's would compute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._costs = load(PACE)
        self._lengths = Lengths()
        self._busy = BUSY_VARIABLE in os.environ

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        began = time.perf_counter()
        tokens = scheduler_output.total_num_scheduled_tokens
        answered = self._lengths.answered(scheduler_output)
        if not tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        if self._busy and tokens > len(answered):
            keep_busy()
        else:
            until = began + step_seconds(self._costs, len(answered), tokens)
            time.sleep(max(until - time.perf_counter(), 0.0))
        return ModelRunnerOutput(
            req_ids=list(answered),
            req_id_to_index={request: index for index, request in enumerate(answered)},
            sampled_token_ids=[[0] if gives else [] for gives in answered.values()],
        )
