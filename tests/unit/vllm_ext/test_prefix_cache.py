"""What vLLM's KV cache manager finds again of a prompt, with Gemma-4-31B's layers and its drafter's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.gemma4_shapes import drafter_config, target_config
from dflash_serve.preflight.shapes import layers
from dflash_serve.settings import Cluster, resolve
from dflash_serve.vllm_ext.kv_groups import padded

PROMPT_TOKENS = 4400


def found_again(retention: int | None) -> int:
    """Tokens of a repeated prompt that the prefix cache gives, drafting with DFlash."""
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec
    from vllm.v1.request import Request

    specs: dict[str, KVCacheSpec] = {}
    for i, layer in enumerate(layers(target_config(tiny=False)) + layers(drafter_config(tiny=False))):
        shape: dict[str, Any] = {"num_kv_heads": layer.kv_heads, "head_size": layer.head_size, "dtype": torch.bfloat16}
        specs[f"layers.{i}"] = (
            SlidingWindowSpec(block_size=16, sliding_window=layer.window, **shape)
            if layer.window
            else FullAttentionSpec(block_size=16, **shape)
        )
    groups = padded(kv_cache_utils._get_kv_cache_groups_uniform_page_size)(
        kv_cache_utils.unify_kv_cache_spec_page_size(specs)
    )
    sizes = {group.kv_cache_spec.block_size for group in groups}
    kv_cache_utils.init_none_hash(sha256)
    manager = KVCacheManager(
        kv_cache_config=KVCacheConfig(
            num_blocks=40000, kv_cache_tensors=[], kv_cache_groups=groups, prefix_cache_retention_interval=retention
        ),
        max_model_len=32768,
        max_in_flight_tokens=65536,
        enable_caching=True,
        use_eagle=True,
        num_prefill_lookahead=1,
        scheduler_block_size=math.lcm(*sizes),
        hash_block_size=min(sizes),
    )
    hit = 0
    for name in ("first", "second"):
        request = Request(
            request_id=name,
            prompt_token_ids=[i * 13 % 5000 for i in range(PROMPT_TOKENS)],
            sampling_params=SamplingParams(max_tokens=8),
            pooling_params=None,
            block_hasher=kv_cache_utils.get_request_block_hasher(min(sizes), sha256),
        )
        blocks, hit, *_ = manager.get_computed_blocks(request)
        assert manager.allocate_slots(request, PROMPT_TOKENS - hit, hit, blocks, num_lookahead_tokens=16) is not None
        request.num_computed_tokens = PROMPT_TOKENS
        manager.free(request)
    return int(hit)


@pytest.mark.parametrize("profile", ["gemma4-31b-b200", "gemma4-31b-b300", "gemma4-31b-h200"])
def test_the_profiles_find_all_but_the_last_blocks(profile: str) -> None:
    engine = resolve({"profile": profile}, Cluster(cpus=8, gpus={}), read_config=lambda _: None).settings.engine
    assert found_again(engine["prefix_cache_retention_interval"]) >= PROMPT_TOKENS - 128


def test_vllms_default_still_finds_nothing() -> None:
    assert found_again(0) == 0, "vLLM mended it: take prefix_cache_retention_interval out of the profiles and preflight"
