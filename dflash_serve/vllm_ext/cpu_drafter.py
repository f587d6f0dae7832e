"""vLLM's DFlash drafter with context keys normalised layer by layer, for CPUs (see `plugin.grouped_rms_norm_works`)."""

from __future__ import annotations

import torch
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model


class CpuDFlashModel(DFlashQwen3Model):
    def _normalize_context_k(self, all_k: torch.Tensor) -> torch.Tensor:
        """RMSNorm over head_dim with each layer's own weights. all_k: [layers, context tokens, KV heads, head_dim]."""
        values = all_k.float()
        eps: float = self._rms_norm_eps  # type: ignore[assignment]
        scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
        return (values * scale * self._k_norm_weights[:, None, None, :].float()).to(all_k.dtype)


class CpuDFlashDrafter(DFlashQwen3ForCausalLM):
    model_cls = CpuDFlashModel
