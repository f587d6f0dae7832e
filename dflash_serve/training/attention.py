"""Which keys a query may see, in packed rows, and the attention that obeys it.

Two masks exist. Each is a rule (a predicate over query and key index) and comes in two forms with the same meaning:
a `BlockMask` for flex attention on a GPU, which skips 128 x 128 tiles that the rule empties, and a dense boolean
tensor for any other device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128
"""Queries and keys in one tile of a BlockMask. Row lengths on a GPU are multiples of it."""

Mask = BlockMask | Tensor
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) indices -> may this query see this key? The signature that flex attention asks for."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Grouped-query attention. query [R, heads, Q, d]; key, value [R, kv_heads, K, d] -> [R, heads, Q, d]."""
    if isinstance(mask, BlockMask):
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def document_mask(document_start: Tensor, use_tiles: bool) -> Mask:
    """Causal attention inside each document of a packed row.

    Args:
        document_start: [R, C], the index in the row of the first token of each token's document.
        use_tiles: a BlockMask if true, else a dense mask [R, 1, C, C].
    """
    rows, length = document_start.shape

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= document_start[batch, query])

    if not use_tiles:
        return _dense(rule, rows, length, length, document_start.device)
    _check_tiles(length)
    num_tiles = length // TILE
    tile = torch.arange(num_tiles, device=document_start.device)
    # Documents lie in order, so the first query of a tile belongs to the tile's earliest document.
    earliest = document_start[:, ::TILE]
    touched = (tile[None, None, :] <= tile[None, :, None]) & ((tile + 1) * TILE > earliest[:, :, None])
    return _tiled(rule, touched, length, length)


def anchor_mask(
    anchors: Tensor, anchor_document_start: Tensor, context_length: int, block_size: int, use_tiles: bool
) -> Mask:
    """What a block of draft slots sees: its document's context before its anchor, and its own block both ways.

    Keys are laid out as [context | block 0 | block 1 | ...], queries as [block 0 | block 1 | ...].

    Args:
        anchors: [R, N], row index of each block's bonus token, ascending (a tile's blocks then see near context).
        anchor_document_start: [R, N], row index of the first token of each anchor's document.
        use_tiles: a BlockMask if true, else a dense mask [R, 1, N * block_size, context_length + N * block_size].
    """
    rows, num_anchors = anchors.shape
    num_queries = num_anchors * block_size
    device = anchors.device

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        in_context = (key >= anchor_document_start[batch, block]) & (key < anchors[batch, block])
        in_block = (key - context_length) // block_size == block
        return torch.where(key < context_length, in_context, in_block)

    if not use_tiles:
        return _dense(rule, rows, num_queries, context_length + num_queries, device)
    _check_tiles(context_length)
    _check_tiles(num_queries)
    if TILE % block_size:
        raise ValueError(f"block_size: {block_size} must divide {TILE} on a GPU")
    query_tiles, context_tiles = num_queries // TILE, context_length // TILE
    tile = torch.arange(context_tiles, device=device)
    blocks_per_tile = TILE // block_size
    starts = anchor_document_start.view(rows, query_tiles, blocks_per_tile, 1)
    ends = anchors.view(rows, query_tiles, blocks_per_tile, 1)
    context = ((starts < (tile + 1) * TILE) & (ends > tile * TILE)).any(dim=2)
    own = torch.eye(query_tiles, dtype=torch.bool, device=device).expand(rows, -1, -1)
    return _tiled(rule, torch.cat([context, own], dim=2), num_queries, context_length + num_queries)


def _dense(rule: Rule, rows: int, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    batch = torch.arange(rows, device=device).view(-1, 1, 1, 1)
    head = torch.zeros(1, dtype=torch.long, device=device).view(1, 1, 1, 1)
    query = torch.arange(num_queries, device=device).view(1, 1, -1, 1)
    key = torch.arange(num_keys, device=device).view(1, 1, 1, -1)
    return rule(batch, head, query, key)


def _tiled(rule: Rule, touched: Tensor, num_queries: int, num_keys: int) -> BlockMask:
    """A BlockMask from the tiles that may hold a visible pair: touched [R, query tiles, key tiles].

    Built by hand because `create_block_mask` evaluates the rule on every (query, key) pair of every step.
    """
    counts = touched.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(touched.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        counts[:, None].contiguous(),
        indices[:, None].contiguous(),
        BLOCK_SIZE=TILE,
        mask_mod=rule,
        seq_lengths=(num_queries, num_keys),
    )


def _check_tiles(length: int) -> None:
    if length % TILE:
        raise ValueError(f"row length or draft tokens a row: {length} must be a multiple of {TILE} on a GPU")
