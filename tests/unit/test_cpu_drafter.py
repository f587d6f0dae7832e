"""vLLM's context keys on CPU: what is wrong with them, and that ours are right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from dflash_serve.vllm_ext.cpu_drafter import grouped_rms_norm_works

LAYERS, TOKENS, KV_HEADS, HEAD_DIM = 3, 5, 2, 64


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU kernel")
def test_the_wheel_still_needs_the_mend() -> None:
    assert not grouped_rms_norm_works(), "vLLM mended its CPU kernel: remove cpu_drafter and its registration"


def test_each_layer_has_its_own_weights() -> None:
    from dflash_serve.vllm_ext.cpu_drafter import CpuDFlashModel

    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(LAYERS, TOKENS, KV_HEADS, HEAD_DIM, generator=generator)
    weights = torch.rand(LAYERS, HEAD_DIM, generator=generator) + 0.5
    model = SimpleNamespace(_rms_norm_eps=1e-5, _k_norm_weights=weights)
    result = CpuDFlashModel._normalize_context_k(model, keys)  # type: ignore[arg-type]
    for layer in range(LAYERS):
        expected = torch.nn.functional.rms_norm(keys[layer], (HEAD_DIM,), weights[layer], 1e-5)
        assert torch.allclose(result[layer], expected, atol=1e-5)
