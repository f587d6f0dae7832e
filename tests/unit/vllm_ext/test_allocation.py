"""The quick KV cache manager against vLLM's own, over requests that come, draft, are stopped and end at random."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from dflash_serve.vllm_ext.allocation import QuickKVCacheManager, install, quicken

BLOCKS = 150


def manager(*, caching: bool = True, drafts: bool = False, retention: int | None = None, alike: bool = False) -> Any:
    import torch
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

    shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.bfloat16}
    specs = [
        SlidingWindowSpec(block_size=16, sliding_window=70, **shape),
        FullAttentionSpec(block_size=32, **shape),
        SlidingWindowSpec(block_size=64, sliding_window=130, **shape),
        FullAttentionSpec(block_size=64, **shape),
    ]
    if alike:
        specs = specs[1:2]
    init_none_hash(sha256)
    return KVCacheManager(
        kv_cache_config=KVCacheConfig(
            num_blocks=BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([str(index)], spec) for index, spec in enumerate(specs)],
            prefix_cache_retention_interval=retention,
        ),
        max_model_len=600,
        max_in_flight_tokens=128,
        enable_caching=caching,
        # as vLLM has them for a DFlash drafter
        use_eagle=drafts,
        num_prefill_lookahead=1 if drafts else 0,
        scheduler_block_size=64 if not alike else 32,
        hash_block_size=16 if not alike else 32,
    )


class Traffic:
    """One manager and its requests, decoding as vLLM's asynchronous scheduler has them: a step ahead of its outputs."""

    def __init__(self, manager: Any, *, seed: int) -> None:
        self.manager = manager
        self.numbers = random.Random(seed)
        self.live: dict[str, Any] = {}
        self.flying: dict[str, int] = {}
        self.number = 0
        self.stopped: list[str] = []
        """Requests that are to come again."""

    def step(self) -> list[Any]:
        """All that the manager said and holds."""
        said: list[Any] = []
        self.manager.new_step_starts()
        if len(self.live) < 12 and self.numbers.random() < 0.5:
            said.append(self._admit())
        for name, request in list(self.live.items()):
            draft = self.numbers.choice([0, 0, 1, 3, 15])
            if request.num_tokens > 520 or self.numbers.random() < 0.01:
                del self.live[name]
                self.flying.pop(name, None)
                self.manager.free(request)
                continue
            fresh = 1 + draft
            blocks = self.manager.allocate_slots(request, fresh, num_lookahead_tokens=16)
            if blocks is None:
                # stopped, to be computed anew
                del self.live[name]
                self.flying.pop(name, None)
                self.manager.block_pool.free_blocks(reversed(self.manager.pop_blocks_for_free(request)))
                self.stopped.append(name)
                said.append((name, "stopped"))
                continue
            said.append((name, blocks.get_block_ids(allow_none=True)))
            request.num_computed_tokens += fresh
            request.num_in_flight_tokens += fresh
            # the step before ends while this one is on its way: some of its drafts were right
            if name in self.flying:
                before = self.flying[name]
                taken = self.numbers.randint(1, before)
                request.num_in_flight_tokens -= before
                request.num_computed_tokens -= before - taken
                request.append_output_token_ids([self.numbers.randrange(3) for _ in range(taken)])
                self.manager.cache_blocks(request, request.num_computed_tokens - fresh)
            self.flying[name] = fresh
        held = {name: self.manager.get_block_ids(name) for name in self.live}
        pool = self.manager.block_pool
        return [said, held, pool.get_num_free_blocks(), set(pool.cached_block_hash_to_block._cache)]

    def _admit(self) -> Any:
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        self.number += 1
        length = self.numbers.choice([5, 64, 65, 90, 200, 210])
        request = Request(
            request_id=self.stopped.pop() if self.stopped else f"request-{self.number}",
            # few kinds of prompt, so that the prefix cache finds them again
            prompt_token_ids=[7] * length,
            sampling_params=SamplingParams(max_tokens=500, ignore_eos=True),
            pooling_params=None,
            block_hasher=get_request_block_hasher(self.manager.block_pool.hash_block_size, sha256),
        )
        found, hit, *_ = self.manager.get_computed_blocks(request)
        blocks = self.manager.allocate_slots(request, length - hit, hit, found, num_lookahead_tokens=16)
        if blocks is None:
            return "full"
        request.num_computed_tokens = length
        request.append_output_token_ids([1])
        self.live[request.request_id] = request
        return hit, blocks.get_block_ids()


@pytest.mark.parametrize(
    "how",
    [{"caching": False}, {}, {"drafts": True}, {"drafts": True, "retention": 64}],
    ids=["no cache", "target alone", "with a drafter", "sparse cache"],
)
def test_it_gives_and_takes_the_blocks_that_vllms_own_does(how: dict[str, Any]) -> None:
    own, quick, caching = manager(**how), manager(**how), how.get("caching", True)
    assert quicken(quick)
    walks: Counter[str] = Counter()

    def count(name: str) -> None:
        walk = getattr(quick.coordinator, name)

        def counted(*args: Any) -> Any:
            walks[name] += 1
            return walk(*args)

        setattr(quick.coordinator, name, counted)

    count("allocate_new_blocks")
    count("cache_blocks")
    first, second = Traffic(own, seed=3), Traffic(quick, seed=3)
    decoded = stopped = found = 0
    for _ in range(500):
        expected = first.step()
        assert second.step() == expected
        decoded += sum(isinstance(said, tuple) and isinstance(said[0], str) for said in expected[0])
        stopped += sum("stopped" in said for said in expected[0])
        found += sum(isinstance(said, tuple) and isinstance(said[0], int) and said[0] > 0 for said in expected[0])
    tried = decoded > 3_000, stopped > 0, found > 0 or not caching
    assert all(tried), "the traffic tries too little"
    assert walks["allocate_new_blocks"] < 0.5 * decoded
    # twice a step without
    assert not caching or 0 < walks["cache_blocks"] < 0.8 * decoded


def test_nothing_is_kept_of_requests_that_ended() -> None:
    quick = manager()
    quicken(quick)
    traffic = Traffic(quick, seed=1)
    for _ in range(50):
        traffic.step()
    assert quick._room.keys() == quick._cached.keys() != set()
    for request in traffic.live.values():
        quick.free(request)
    assert not quick._room
    assert not quick._cached


def test_it_stands_aside_where_groups_do_more() -> None:
    unknown = manager()
    unknown.coordinator.num_reprefillable_tokens = 2
    assert not quicken(unknown)
    own = manager(alike=True)
    assert quicken(own)
    assert type(own) is QuickKVCacheManager
    assert not quicken(own), "it is ours already"


def test_the_plugin_gives_it_to_every_engine() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    assert type(manager()) is KVCacheManager
    install()
    install()
    assert type(manager()) is QuickKVCacheManager
