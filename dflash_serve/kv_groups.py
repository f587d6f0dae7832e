"""Into how many groups vLLM splits the layers that share its KV cache.

Each group has a block table of its own, and vLLM's scheduler and attention metadata walk all groups of all requests at
every step. vLLM 0.29 makes groups as large as the rarest kind of layer is numerous
(`_get_kv_cache_groups_uniform_page_size` in vllm/v1/core/kv_cache_utils.py), and Gemma-4's drafter has one full layer:
65 groups of one layer, where the target alone has 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

MANY_GROUPS = 16
"""Up to so many groups vLLM's own way stands."""
MOST_PADDING = 0.1
"""Share of the layers that may be added as padding: pages of a block that no layer uses."""


def layers_per_group(counts: Sequence[int]) -> int:
    """Layers of a group, padding included.

    Args:
        counts: How many layers there are of each kind.
    """
    own = vllm_layers_per_group(counts)
    if groups(counts, own) <= MANY_GROUPS:
        return own
    padded = (size for size in range(max(counts), own, -1) if _padding(counts, size) <= MOST_PADDING * sum(counts))
    return next(padded, own)


def vllm_layers_per_group(counts: Sequence[int]) -> int:
    """The same as vLLM 0.29 has it."""
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)


def groups(counts: Sequence[int], size: int) -> int:
    """How many groups of `size` layers hold them all, each group layers of one kind."""
    return sum(ceil(count / size) for count in counts)


def _padding(counts: Sequence[int], size: int) -> int:
    return groups(counts, size) * size - sum(counts)
