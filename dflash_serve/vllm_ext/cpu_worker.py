"""vLLM's CPU worker with drafting left out where the next step verifies nothing (`worker_cls`).

At K = 0 vLLM 0.29's proposer still runs the drafter on one token a request. What must go on at every step is the
projection of the target's hidden states into the drafter's KV cache, lest a later draft miss its context; the pass over
the block after it is left out. vLLM's own method is ended between the two by an exception, so nothing is copied here.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.spec_decode.dflash import DFlashProposer
from vllm.v1.worker.cpu_worker import CPUWorker


class _ContextStored(Exception):
    """The drafter's KV cache has this step's context."""


class SkippingProposer(DFlashProposer):
    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            draft: torch.Tensor = super().propose(num_speculative_tokens, *args, **kwargs)
        except _ContextStored:
            requests = kwargs["next_token_ids"].shape[0]
            return torch.empty(requests, 0, device=self.device, dtype=torch.int64)
        return draft

    def build_model_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().build_model_inputs_first_pass(*args, **kwargs)
        if self.num_speculative_tokens == 0:
            raise _ContextStored
        return inputs


class AdaptiveCPUWorker(CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        drafter = getattr(self.model_runner, "drafter", None)
        if type(drafter) is DFlashProposer:
            drafter.__class__ = SkippingProposer
