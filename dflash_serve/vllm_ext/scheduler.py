"""vLLM's schedulers with the draft length chosen at every step (`scheduler_cls`).

vLLM 0.29 lets a schedule by batch size say how many draft tokens the next step verifies
(`num_speculative_tokens_per_batch_size`). Here `DraftLengthController` says it: the number is put where vLLM's own
would stand, `SchedulerOutput.num_spec_tokens_to_schedule`, before vLLM makes placeholders (or, on CPU, drafts) of it.

What is verified changes, never what is accepted: output stays the target's.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from dflash_serve.speculation.config import AdaptiveConfig
from dflash_serve.speculation.controller import DraftLengthController
from dflash_serve.speculation.report import REPORT_SECONDS, REPORT_VARIABLE, write_report

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

logger = logging.getLogger("vllm.dflash_serve")


@dataclass(frozen=True)
class Scheduled:
    """A step on its way."""

    began: float
    draft_tokens: int
    """That it verifies for each request (K)."""
    alone: bool
    """Whether it decodes, the same K for all, and does nothing else."""


class AdaptiveScheduler(Scheduler):
    """vLLM's scheduler, or its asynchronous one where the engine runs that, with our choice of K.

    Its settings are `additional_config["dflash_serve"]`, see `AdaptiveConfig`.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> AdaptiveScheduler:
        if cls is AdaptiveScheduler and vllm_config.scheduler_config.async_scheduling:
            return object.__new__(AdaptiveAsyncScheduler)
        return object.__new__(cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        config = AdaptiveConfig.from_additional(vllm_config.additional_config, self.num_spec_tokens)
        self.draft_length = DraftLengthController(config.choices, config.costs, exploration=config.exploration)
        if self.parallel_config.data_parallel_size > 1:
            # ranks that verify different numbers of tokens would wait for each other forever
            logger.warning("draft length: fixed at %d under data parallelism", self.num_spec_tokens)
            self.draft_length.force(self.num_spec_tokens)
        self._steps: dict[int, Scheduled] = {}
        """Those not yet observed, in the order in which they were scheduled."""
        self._schedule_began = 0.0
        self._last_output = 0.0
        self._last_was_alone = not isinstance(self, AsyncScheduler)
        self._next_draft_tokens = self.num_spec_tokens
        report = os.environ.get(REPORT_VARIABLE)
        self._report_to = Path(report) if report else None
        self._reported = 0.0
        self.on_step: Callable[[int, int, float | None, bool], None] | None = None
        """Called after each step that decoded with (requests, draft tokens, its seconds unless it did something else as
        well, whether it drafted as many tokens as it verified): calibration watches."""
        logger.info("draft length: chosen from %s; step costs begin at: %s", list(config.choices), config.costs.about)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._schedule_began = time.monotonic()
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        requests = len(scheduler_output.num_scheduled_tokens)
        if requests:
            chosen = self.draft_length.choose(requests, self._schedule_began)
            # what this step verifies was chosen the last time
            verified = self._next_draft_tokens
            self._steps[id(scheduler_output)] = Scheduled(
                self._schedule_began, verified, decodes_alone(scheduler_output, verified)
            )
            self._next_draft_tokens = chosen
            scheduler_output.num_spec_tokens_to_schedule = chosen
        super()._update_after_schedule(scheduler_output)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step = self._steps.pop(id(scheduler_output), None)
        if step is not None:
            self._observe(scheduler_output, model_runner_output, step)
        result: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        now = time.monotonic()
        if self._report_to is not None and (
            now - self._reported >= REPORT_SECONDS or not self.has_unfinished_requests()
        ):
            self._reported = now
            write_report(self._report_to, self.draft_length.report())
        return result

    def _observe(self, scheduled: SchedulerOutput, output: ModelRunnerOutput, step: Scheduled) -> None:
        now, draft_tokens = time.monotonic(), step.draft_tokens
        seconds = now - max(step.began, self._last_output)
        self._last_output = now
        drafts = scheduled.scheduled_spec_decode_tokens
        requests = len(scheduled.num_scheduled_tokens)
        outcomes, decoded = count_outcomes(drafts, output, scheduled.num_invalid_spec_tokens, draft_tokens)
        # Where steps overlap, what a prefill step leaves to the drafter is still done as the next one begins, and a
        # step's end is seen late when the one after it, a prefill, was being launched.
        clean = step.alone and self._last_was_alone and all(later.alone for later in self._steps.values())
        self._last_was_alone = step.alone or not isinstance(self, AsyncScheduler)
        if decoded:
            running, alone = (requests if step.alone else decoded), (seconds if clean else None)
            steady = draft_tokens == scheduled.num_spec_tokens_to_schedule
            tokens, ended = (0, 0) if step.alone else count_prompts(scheduled, output, draft_tokens)
            self.draft_length.observe(
                running,
                draft_tokens,
                outcomes,
                alone,
                since_last=seconds,
                prefill_tokens=tokens,
                prompts_ended=ended,
                steady=steady,
            )
            if self.on_step is not None:
                self.on_step(running, draft_tokens, alone, steady)
        else:
            self.draft_length.observe_no_decoding()


class AdaptiveAsyncScheduler(AdaptiveScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler, which GPUs run."""


def decodes_alone(scheduled: SchedulerOutput, draft_tokens: int) -> bool:
    """Whether a step verifies `draft_tokens` for each of its requests and does nothing else."""
    requests = len(scheduled.num_scheduled_tokens)
    return scheduled.total_num_scheduled_tokens == requests * (1 + draft_tokens) and (
        draft_tokens == 0 or len(scheduled.scheduled_spec_decode_tokens) == requests
    )


def count_prompts(scheduled: SchedulerOutput, output: ModelRunnerOutput, draft_tokens: int) -> tuple[int, int]:
    """(Tokens of prompts in a step, prompts that ended in it): of requests with more tokens than a decoding one has."""
    tokens = ended = 0
    sampled = output.sampled_token_ids
    for request, count in scheduled.num_scheduled_tokens.items():
        if count > 1 + draft_tokens:
            tokens += count
            index = output.req_id_to_index.get(request)
            ended += index is not None and bool(sampled) and len(sampled[index]) > 0
    return tokens, ended


def count_outcomes(
    drafts: Mapping[str, list[int]],
    output: ModelRunnerOutput,
    invalid: Mapping[str, int] | None,
    draft_tokens: int,
) -> tuple[dict[tuple[int, int], int], int]:
    """(verified, accepted) -> requests, and how many requests decoded at all.

    Args:
        drafts: Draft tokens that the step verified, by request.
        invalid: Of those, how many at the end a grammar ruled out before the target saw them. The first of them is
            as wrong as one that the target rejects; of those after it nothing is known.
        draft_tokens: Most that were chosen; a request with more got zeros in place of a draft near the context's end.
    """
    sampled = output.sampled_token_ids
    outcomes: dict[tuple[int, int], int] = {}
    decoded = 0
    if not sampled:
        return outcomes, decoded
    for request, index in output.req_id_to_index.items():
        generated = len(sampled[index])
        if not generated:
            continue
        decoded += 1
        verified = len(drafts.get(request, ()))
        if invalid and (ruled_out := invalid.get(request, 0)):
            verified -= ruled_out - 1
        if 0 < verified <= draft_tokens:
            outcome = (verified, min(generated - 1, verified))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes, decoded
