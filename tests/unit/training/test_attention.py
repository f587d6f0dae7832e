"""The BlockMask built by hand must say what the dense mask says, and flex attention must agree with plain attention."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from dflash_serve.training.attention import TILE, Mask, anchor_mask, attend, document_mask


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([[start for i, n in enumerate(lengths) for start in [sum(lengths[:i])] * n]])


def check(tiled: Mask, dense: Mask, num_queries: int, num_keys: int, rows: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(rows, 6, num_queries, 16)
    key, value = torch.randn(2, rows, 2, num_keys, 16)
    torch.testing.assert_close(attend(query, key, value, tiled), attend(query, key, value, dense))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_document_mask() -> None:
    starts = torch.cat([starts_of([100, 156, 256]), starts_of([3, 400, 109])])
    tiled, dense = document_mask(starts, use_tiles=True), document_mask(starts, use_tiles=False)
    assert covered(tiled, dense)
    check(tiled, dense, 512, 512, rows=2)
    assert isinstance(tiled, BlockMask)
    assert tiled.sparsity() > 40  # percent of tiles skipped


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_anchor_mask() -> None:
    starts = torch.cat([starts_of([100, 156, 256]), starts_of([3, 400, 109])])
    torch.manual_seed(0)
    anchors = torch.stack([torch.randperm(512)[:32].sort().values for _ in range(2)])
    tiled, dense = (anchor_mask(anchors, starts.gather(1, anchors), 512, 16, use_tiles) for use_tiles in (True, False))
    assert covered(tiled, dense)
    check(tiled, dense, 512, 1024, rows=2)
    assert isinstance(tiled, BlockMask)
    assert tiled.sparsity() > 40


def covered(tiled: Mask, dense: Mask) -> bool:
    """No visible pair lies in a skipped tile (uncompiled flex attention would not notice: it skips nothing)."""
    assert isinstance(tiled, BlockMask)
    assert isinstance(dense, torch.Tensor)
    rows, _, queries, keys = dense.shape
    needed = dense.view(rows, queries // TILE, TILE, keys // TILE, TILE).any(dim=4).any(dim=2)
    return bool((tiled.to_dense()[:, 0].bool() | ~needed).all())


def test_a_row_that_is_no_multiple_of_the_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="100 must be a multiple of 128"):
        document_mask(starts_of([100]), use_tiles=True)
