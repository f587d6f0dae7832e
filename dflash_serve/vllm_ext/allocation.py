"""vLLM's KV cache manager with one comparison in place of a walk where a step needs nothing of it.

`KVCacheManager.allocate_slots` asks every KV cache group at every step of every request for three things: blocks for
the next tokens, blocks that have left the attention window, and full blocks for the prefix cache; with asynchronous
scheduling `cache_blocks` asks for the last once more when the step has ended. Blocks hold 16 tokens or more, so while a
request decodes the answer of most steps is no, and which count of tokens changes it is known beforehand. Gemma-4 with
its drafter has 14 groups (`dflash_serve.kv_groups`).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.dflash_serve")

ENDLESS = 1 << 62
READ_OF_GROUPS: dict[type, tuple[str, ...]] = {
    FullAttentionManager: ("block_size", "req_to_blocks"),
    SlidingWindowManager: ("block_size", "req_to_blocks", "sliding_window", "extra_retained_tokens"),
}
"""Kinds of groups of which it is known what can change, and what is read of them."""


@dataclass(frozen=True)
class Room:
    """Counts of tokens of a request up to which its blocks stay as they are."""

    slots: int
    """Tokens that have a slot in every group."""
    processed: int
    """Computed tokens with fewer than which no block more leaves a window."""


class QuickKVCacheManager(KVCacheManager):
    _room: dict[str, Room]
    _cached: dict[str, int]
    """Tokens of a request with fewer than which no block more is full."""

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
                and min(computed + num_new_tokens, request.num_tokens) < self._cached[request.request_id]
            ):
                return self.empty_kv_cache_blocks
        blocks: KVCacheBlocks | None = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is None or not running:
            self._room.pop(request.request_id, None)
        else:
            self._room[request.request_id] = self._room_of(request)
            self._cached[request.request_id] = self._next_full(
                request, min(request.num_computed_tokens + num_new_tokens, request.num_tokens)
            )
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        if num_computed_tokens < self._cached.get(request.request_id, 0):
            return
        super().cache_blocks(request, num_computed_tokens)
        if request.request_id in self._room:
            self._cached[request.request_id] = self._next_full(request, num_computed_tokens)

    def _next_full(self, request: Request, tokens: int) -> int:
        if not self.enable_caching:
            return ENDLESS
        unit = self.block_pool.hash_block_size
        return max((tokens // unit + 1) * unit, self._cached.get(request.request_id, 0))

    def _room_of(self, request: Request) -> Room:
        processed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        slots = leaves = ENDLESS
        for manager in self.coordinator.single_type_managers:
            slots = min(slots, len(manager.req_to_blocks[request.request_id]) * manager.block_size)
            if isinstance(manager, SlidingWindowManager):
                kept = manager.sliding_window - 1 + manager.extra_retained_tokens
                gone = max(0, processed - kept) // manager.block_size
                leaves = min(leaves, (gone + 1) * manager.block_size + kept)
        return Room(slots, leaves)

    def _forget(self, request: Request) -> None:
        self._room.pop(request.request_id, None)
        self._cached.pop(request.request_id, None)

    def free(self, request: Request) -> None:
        self._forget(request)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        self._forget(request)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request)
        return blocks


def quicken(manager: Any) -> bool:
    """Make a `KVCacheManager` one of ours in place. False where its groups do more than is known here.

    Raises AttributeError when vLLM has no longer what is read of it.
    """
    coordinator = manager.coordinator
    if type(manager) is not KVCacheManager or coordinator.num_reprefillable_tokens:
        return False
    for group in coordinator.single_type_managers:
        read = READ_OF_GROUPS.get(type(group))
        if read is None or group.dcp_world_size > 1 or group.pcp_world_size > 1:
            return False
        for name in read:
            getattr(group, name)
        if manager.enable_caching and group.block_size % manager.block_pool.hash_block_size:
            return False
    quick: Any = manager
    quick.__class__ = QuickKVCacheManager
    quick._room, quick._cached = {}, {}
    return True


def install() -> None:
    """Have every `KVCacheManager` of this process be one of ours, where that can be. Does nothing the second time."""
    own = KVCacheManager.__init__
    if own.__module__ == __name__:
        return

    @functools.wraps(own, assigned=())
    def begun(self: KVCacheManager, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        try:
            ours = quicken(self)
        except AttributeError as error:
            logger.warning("KV cache: vLLM has no %s any more; its own manager stays", error.name)
        else:
            if not ours:
                logger.info("KV cache: vLLM's own manager, for groups of a kind of their own")

    KVCacheManager.__init__ = begun  # type: ignore[method-assign]
