"""What vLLM runs in each of its processes at start (entry point group `vllm.general_plugins`)."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.dflash_serve")

DRAFTER_ARCHITECTURE = "DFlashDraftModel"


def register() -> None:
    """Put our drafter class in the place of vLLM's where vLLM's computes something else than DFlash."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not grouped_rms_norm_works():
        ModelRegistry.register_model(DRAFTER_ARCHITECTURE, "dflash_serve.vllm_ext.cpu_drafter:CpuDFlashDrafter")
        logger.info("DFlash drafter: context keys are normalised by dflash-serve on CPU")


def grouped_rms_norm_works() -> bool:
    """Whether vLLM's `rms_norm` takes one weight vector a group, as its DFlash drafter needs for its context keys.

    vLLM 0.29's CPU kernel applies the first group's weights to all: drafter layers after the first then see wrong
    keys, and acceptance falls (2.40 to 2.21 at K=7 with the bundled pair).
    """
    import torch
    from vllm import _custom_ops as ops

    values = torch.ones(2, 1, 1, 64)
    weights = torch.stack([torch.ones(64), torch.full((64,), 2.0)])
    result = torch.empty_like(values)
    ops.rms_norm(result, values, weights, 1e-6)
    return bool(torch.allclose(result[1], torch.full_like(result[1], 2.0), atol=1e-3))
