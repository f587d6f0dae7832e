"""Sampling with drafts on CPUs: vLLM 0.29 reads temperature, top-k and top-p of a verification from memory that nothing
has written, so that all but greedy answers are noise (vllm-project/vllm#55005)."""

from __future__ import annotations

import torch


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cumulative_counts: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Each request's value once for each of its draft tokens.

    Args:
        output: [draft tokens]; written, in its own type.
        values: [requests].
        cumulative_counts: [requests], draft tokens of the requests up to and with each.
        replace_from: Value that is replaced.
        replace_to: By this.
        MAX_NUM_TOKENS: For vLLM's GPU kernel.
    """
    counts = torch.diff(cumulative_counts, prepend=cumulative_counts.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    output.copy_(torch.repeat_interleave(replaced, counts.to(torch.int64), output_size=output.numel()))


def install() -> None:
    """Before vLLM's CPU runner takes its kernels. Raises ImportError or AttributeError where they have moved."""
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils.expand_kernel = type(cpu_triton_utils.expand_kernel)(expand)
