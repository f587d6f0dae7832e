"""The estimate against Gemma-4-31B's known sizes, and against vLLM's own KV cache code."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.gemma4_shapes import drafter_config, target_config
from dflash_serve.preflight.checks import GIB
from dflash_serve.preflight.memory import IN_FLIGHT_BATCHES, estimate, kv_groups
from dflash_serve.preflight.shapes import Layer, bytes_per_weight, layers, parameters
from dflash_serve.settings import Cluster, Settings, resolve
from dflash_serve.vllm_ext.kv_groups import padded

TARGET, DRAFTER = target_config(tiny=False), drafter_config(tiny=False)


def settings(**args: Any) -> Settings:
    values = {"profile": "gemma4-31b-h200"} | args
    return resolve(values, Cluster(cpus=8, gpus={}), read_config=lambda _: None).settings


def test_weights_are_those_of_the_cards() -> None:
    # 30.70 B in the checkpoint; vLLM keeps values beside keys in the ten full layers
    assert parameters(TARGET, embeds=True) / 1e9 == pytest.approx(30.70 + 0.11, abs=0.01)
    assert parameters(DRAFTER, embeds=False) / 1e9 == pytest.approx(1.54, abs=0.01)
    assert bytes_per_weight(TARGET, "bfloat16") == 2
    assert bytes_per_weight(TARGET | {"quantization_config": {"quant_method": "fp8"}}, "bfloat16") == 1


def test_kv_cache_of_a_token() -> None:
    memory = estimate(settings(), TARGET, DRAFTER, 141 * 10**9)
    # ten full layers of 4 heads x 512 and one of the drafter of 8 x 128, keys and values in bfloat16
    assert memory.kv_bytes_per_token == 10 * 2 * 4 * 512 * 2 + 2 * 8 * 128 * 2
    assert memory.window_bytes == 50 * 1024 * 2 * 16 * 256 * 2 + 4 * 2048 * 2 * 8 * 128 * 2
    (short, long) = memory.fits
    assert (short.tokens, long.tokens) == (4096, 32768)
    assert short.held_bytes / GIB == pytest.approx(1.22, abs=0.02)
    assert long.held_bytes / GIB == pytest.approx(3.96, abs=0.02)
    assert long.admitted_bytes > long.held_bytes
    assert short.requests > long.requests > 0


def test_smaller_batches_start_long_requests_with_less() -> None:
    large = estimate(settings(), TARGET, DRAFTER, 141 * 10**9).fits[-1]
    small = estimate(settings(engine={"max_num_batched_tokens": 4096}), TARGET, DRAFTER, 141 * 10**9).fits[-1]
    assert small.held_bytes == large.held_bytes
    assert small.admitted_bytes < large.admitted_bytes / 2
    assert small.requests > large.requests


@pytest.mark.parametrize("tiny", [False, True])
def test_blocks_are_vllms(tiny: bool) -> None:
    """Groups, block sizes and what a request of the longest length reserves."""
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

    all_layers = layers(target_config(tiny=tiny)) + layers(drafter_config(tiny=tiny))

    def spec(layer: Layer) -> KVCacheSpec:
        shape: dict[str, Any] = {
            "block_size": 16,
            "num_kv_heads": layer.kv_heads,
            "head_size": layer.head_size,
            "dtype": torch.bfloat16,
        }
        return SlidingWindowSpec(**shape, sliding_window=layer.window) if layer.window else FullAttentionSpec(**shape)

    specs = {f"layers.{i}": spec(layer) for i, layer in enumerate(all_layers)}
    own = kv_cache_utils._get_kv_cache_groups_uniform_page_size
    theirs = padded(own)(kv_cache_utils.unify_kv_cache_spec_page_size(specs))
    if not tiny:
        assert len(theirs) == 14
        assert sum(len(group.layer_names) for group in theirs) == len(specs)
    block_bytes, ours = kv_groups(all_layers, 2.0, 1)
    assert sum(group.count for group in ours) == len(theirs)
    assert block_bytes == kv_cache_utils._get_kv_cache_bytes_per_block(theirs)
    assert sorted(group.block_tokens for group in ours for _ in range(group.count)) == sorted(
        group.kv_cache_spec.block_size for group in theirs
    )
    tokens, batch = 32768, 4096
    reserved = sum(
        group.kv_cache_spec.max_admission_blocks_per_request(IN_FLIGHT_BATCHES * batch, tokens)
        if isinstance(group.kv_cache_spec, SlidingWindowSpec)
        else math.ceil(tokens / group.kv_cache_spec.block_size)
        for group in theirs
    )
    assert sum(group.admitted(tokens, IN_FLIGHT_BATCHES * batch) for group in ours) == reserved


def test_uniform_layers_share_one_block_table() -> None:
    block_bytes, groups = kv_groups([Layer(3, 64, None)] * 34, 4.0, 1)
    assert (block_bytes, [group.count for group in groups]) == (34 * 16 * 2 * 3 * 64 * 4, [1])
    assert groups[0].held(100) == 7
