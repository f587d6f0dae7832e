"""Fewer KV cache groups where vLLM would make many (see `dflash_serve.kv_groups`).

vLLM takes the rarest kind of layer as the measure of a group. Here it is shown that kind with layers that do not exist,
which are struck from its groups again: a group with fewer layers than others is what vLLM pads anyway.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm.v1.core import kv_cache_utils

from dflash_serve import kv_groups

logger = logging.getLogger("vllm.dflash_serve")

GROUPING = "_get_kv_cache_groups_uniform_page_size"
PADDING = "dflash_serve.padding"
Grouping = Callable[[dict[str, Any]], list[Any]]


def install() -> None:
    """Have vLLM group layers by `padded`. Does nothing the second time, or where vLLM's function has gone."""
    own = getattr(kv_cache_utils, GROUPING, None)
    if own is None:
        logger.warning("KV cache groups: vLLM has no %s any more; dflash-serve stands aside", GROUPING)
    elif own.__module__ != __name__:
        setattr(kv_cache_utils, GROUPING, padded(own))


def padded(own: Grouping) -> Grouping:
    """`own` with groups of `kv_groups.layers_per_group`."""

    def grouped(kv_cache_spec: dict[str, Any]) -> list[Any]:
        kinds = Counter(kv_cache_spec.values())
        counts = list(kinds.values())
        size, theirs = kv_groups.layers_per_group(counts), kv_groups.vllm_layers_per_group(counts)
        if size == theirs:
            return own(kv_cache_spec)
        more = {
            f"{PADDING}.{kind}.{index}": spec
            for kind, (spec, count) in enumerate(kinds.items())
            for index in range(size - count)
        }
        groups = own(kv_cache_spec | more)
        for group in groups:
            group.layer_names = [name for name in group.layer_names if name not in more]
        logger.info("KV cache groups: %d in place of vLLM's %d", len(groups), kv_groups.groups(counts, theirs))
        return groups

    return grouped
