"""Sampling with drafts on CPUs: what is wrong with vLLM's, and that with ours answers follow the target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler

from dflash_serve.vllm_ext import cpu_sampling

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU kernels")
KERNELS = ("expand", "rejection_greedy_sample", "rejection_random_sample", "sample_recovered_tokens")


@pytest.fixture
def cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's CPU runner has them, after our plugin."""
    import vllm._custom_ops  # noqa: F401  loads the kernels

    monkeypatch.setattr(cpu_triton_utils, "expand_kernel", cpu_triton_utils.expand_kernel)
    cpu_sampling.install()
    for name in KERNELS:
        monkeypatch.setattr(rejection_sampler, f"{name}_kernel", getattr(cpu_triton_utils, f"{name}_kernel"))


def test_the_wheel_still_needs_the_mend() -> None:
    import vllm._custom_ops  # noqa: F401

    output = torch.full((3,), -1.0)
    cpu_triton_utils._expand_kernel_impl(
        output, torch.tensor([0.5, 0.7]), torch.tensor([1, 3], dtype=torch.int32), 0, 1
    )
    assert output.tolist() == [-1, -1, -1], "vLLM mended #55005: remove cpu_sampling"


@pytest.mark.usefixtures("cpu_kernels")
def test_each_draft_token_has_its_requests_value() -> None:
    counts = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    temperature = torch.tensor([0.7, 0.3, 0.0, 1.5])
    expanded = rejection_sampler.expand_batch_to_tokens(temperature, counts, 6, replace_from=0, replace_to=1)
    assert expanded.tolist() == pytest.approx([0.7, 0.7, 1, 1, 1, 1.5])
    top_k = torch.tensor([5, 6, 7, 8], dtype=torch.int32)
    expanded = rejection_sampler.expand_batch_to_tokens(top_k, counts, 6)
    assert (expanded.dtype, expanded.tolist()) == (torch.int32, [5, 5, 7, 7, 7, 8])


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("draft", [0, 1, 4])
def test_verified_drafts_leave_the_targets_distribution_as_it_is(draft: int) -> None:
    """Whatever was drafted: likely, or never right."""
    torch.manual_seed(draft)
    requests, temperature = 40_000, 0.7
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -4.0])
    metadata: Any = SimpleNamespace(
        all_greedy=False,
        all_random=True,
        temperature=torch.full((requests,), temperature),
        top_k=None,
        top_p=None,
        generators={},
    )
    counts = torch.arange(1, requests + 1, dtype=torch.int32)
    scaled = rejection_sampler.apply_sampling_constraints(logits.repeat(requests, 1), counts, metadata)
    tokens = rejection_sampler.rejection_sample(
        torch.full((requests,), draft, dtype=torch.int32),
        [1] * requests,
        1,
        counts,
        None,
        scaled,
        torch.zeros(requests, 1, dtype=torch.int64),
        metadata,
    )
    found = torch.bincount(tokens[:, 0].to(torch.int64), minlength=5) / requests
    wanted = torch.softmax(logits / temperature, 0)
    # five times the deviation that chance has
    assert torch.all((found - wanted).abs() < 5 * (wanted * (1 - wanted) / requests).sqrt() + 1e-4), (found, wanted)
