"""vLLM's DFlash drafter with context keys normalised layer by layer, for CPUs."""

from __future__ import annotations

import torch
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model


class CpuDFlashModel(DFlashQwen3Model):
    def _normalize_context_k(self, all_k: torch.Tensor) -> torch.Tensor:
        """RMSNorm over head_dim with each layer's own weights. all_k: [layers, context tokens, KV heads, head_dim]."""
        values = all_k.float()
        eps: float = self._rms_norm_eps  # type: ignore[assignment]
        scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
        return (values * scale * self._k_norm_weights[:, None, None, :].float()).to(all_k.dtype)


def grouped_rms_norm_works() -> bool:
    """Whether vLLM's `rms_norm` takes one weight vector a group, as its DFlash drafter needs for its context keys.

    vLLM 0.29's CPU kernel applies the first group's weights to all: drafter layers after the first then see wrong
    keys, and acceptance falls (2.40 to 2.21 at K=7 with the bundled pair).
    """
    from vllm import _custom_ops as ops

    # on CPU and in float32 whatever the defaults are where a model is being built
    values = torch.ones(2, 1, 1, 64, dtype=torch.float32, device="cpu")
    weights = torch.stack([torch.ones_like(values[0, 0, 0]), torch.full_like(values[0, 0, 0], 2.0)])
    result = torch.empty_like(values)
    ops.rms_norm(result, values, weights, 1e-6)
    return bool(torch.allclose(result[1], torch.full_like(result[1], 2.0), atol=1e-3))
