"""How many layers a KV cache group has."""

from __future__ import annotations

import pytest

from dflash_serve.kv_groups import groups, layers_per_group


@pytest.mark.parametrize(
    ("about", "counts", "size", "count"),
    [
        ("Gemma-4-31B and its drafter", [50, 10, 4, 1], 5, 14),
        ("Gemma-4-31B alone: vLLM's way", [50, 10], 10, 6),
        ("a drafter that adds to the full layers: vLLM's way, with padding", [12, 13], 13, 2),
        ("one full layer, and no padding that is worth it", [17, 1], 1, 18),
        ("few groups: left alone", [12, 1], 1, 13),
    ],
)
def test_layers_per_group(about: str, counts: list[int], size: int, count: int) -> None:
    assert (layers_per_group(counts), groups(counts, layers_per_group(counts))) == (size, count), about
