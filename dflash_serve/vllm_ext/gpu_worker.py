"""vLLM's GPU worker with drafting left out where the next step verifies nothing (`worker_cls`).

At K = 0 vLLM 0.29's V2 speculator still drafts the whole block (4 ms at 32 requests with Gemma-4-31B on an H200). What
must go on at every step is the projection of the target's hidden states into the drafter's KV cache, lest a later draft
miss its context; the pass over the block after it is left out. vLLM's own method is ended between the two by an
exception, so nothing is copied here.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator
from vllm.v1.worker.gpu_worker import Worker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger("vllm.dflash_serve")


class _ContextStored(Exception):
    """The drafter's KV cache has this step's context."""


class SkippingSpeculator(DFlashSpeculator):
    draft_is_wanted = True

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            draft: torch.Tensor = super().propose(input_batch, *args, **kwargs)
        except _ContextStored:
            # old drafts, which no request was given a place for
            return self.draft_tokens[: input_batch.num_reqs]
        return draft

    def _build_draft_attn_metadata(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """What `propose` calls next after it has stored the context."""
        if not self.draft_is_wanted:
            raise _ContextStored
        metadata: dict[str, Any] | None = super()._build_draft_attn_metadata(*args, **kwargs)
        return metadata


class SkipsDrafting:
    """Goes before a worker whose model runner is vLLM's V2."""

    model_runner: Any
    parallel_config: Any

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        speculator = getattr(self.model_runner, "speculator", None)
        # under data parallelism the ranks agree on the draft's size inside `propose`, and K is fixed anyway
        if type(speculator) is DFlashSpeculator and self.parallel_config.data_parallel_size == 1:
            speculator.__class__ = SkippingSpeculator
            logger.info("DFlash drafter: left out in steps after which nothing is verified")

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        speculator = getattr(self.model_runner, "speculator", None)
        if isinstance(speculator, SkippingSpeculator):
            speculator.draft_is_wanted = scheduler_output.num_spec_tokens_to_schedule > 0
        return super().execute_model(scheduler_output)  # type: ignore[misc]


class AdaptiveWorker(SkipsDrafting, Worker):
    pass
