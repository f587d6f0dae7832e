"""vLLM's KV cache manager with one comparison in place of a walk where a step needs nothing of it.

`KVCacheManager.allocate_slots` asks every KV cache group at every step of every request for three things: blocks for
the next tokens, blocks that have left the attention window, and full blocks for the prefix cache. Blocks hold 16 tokens
or more, so while a request decodes the answer of most steps is no, and which count of tokens changes it is known
beforehand. Gemma-4 with its drafter has 14 groups (`dflash_serve.kv_groups`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

ENDLESS = 1 << 62


@dataclass(frozen=True)
class Room:
    """Counts of tokens of a request up to which its blocks stay as they are."""

    slots: int
    """Tokens that have a slot in every group."""
    processed: int
    """Computed tokens with fewer than which no block more leaves a window."""
    cached: int
    """Tokens with fewer than which no block more is full."""


class QuickKVCacheManager(KVCacheManager):
    _room: dict[str, Room]

    def allocate_slots(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        lookahead = kwargs.get("num_lookahead_tokens", 0)
        # what vLLM's scheduler says of a running request, and no more
        running = not args and len(kwargs) == 1 and "num_lookahead_tokens" in kwargs
        room = self._room.get(request.request_id) if running else None
        if room is not None:
            computed = request.num_computed_tokens
            if (
                computed + num_new_tokens + lookahead <= room.slots
                and computed - request.num_in_flight_tokens < room.processed
                and min(computed + num_new_tokens, request.num_tokens) < room.cached
            ):
                return self.empty_kv_cache_blocks
        blocks: KVCacheBlocks | None = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is None or not running:
            self._room.pop(request.request_id, None)
        else:
            self._room[request.request_id] = self._room_of(request, num_new_tokens)
        return blocks

    def _room_of(self, request: Request, num_new_tokens: int) -> Room:
        computed = request.num_computed_tokens
        processed = max(0, computed - request.num_in_flight_tokens)
        slots = leaves = ENDLESS
        for manager in self.coordinator.single_type_managers:
            slots = min(slots, len(manager.req_to_blocks[request.request_id]) * manager.block_size)
            if isinstance(manager, SlidingWindowManager):
                kept = manager.sliding_window - 1 + manager.extra_retained_tokens
                gone = max(0, processed - kept) // manager.block_size
                leaves = min(leaves, (gone + 1) * manager.block_size + kept)
        cached = ENDLESS
        if self.enable_caching:
            unit = self.block_pool.hash_block_size
            cached = (min(computed + num_new_tokens, request.num_tokens) // unit + 1) * unit
        return Room(slots, leaves, cached)

    def free(self, request: Request) -> None:
        self._room.pop(request.request_id, None)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        self._room.pop(request.request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request)
        return blocks


def quicken(manager: Any) -> bool:
    """Make a `KVCacheManager` one of ours in place. False where its groups do more than is known here."""
    coordinator = manager.coordinator
    known = type(manager) is KVCacheManager and not coordinator.num_reprefillable_tokens
    if not known or any(
        type(group) not in (FullAttentionManager, SlidingWindowManager)
        or group.dcp_world_size > 1
        or group.pcp_world_size > 1
        for group in coordinator.single_type_managers
    ):
        return False
    manager.__class__ = QuickKVCacheManager
    manager._room = {}
    return True
