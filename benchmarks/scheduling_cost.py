"""CPU time of vLLM's scheduler by how the KV cache is grouped: `python -m benchmarks.scheduling_cost`.

vLLM gives every group of layers a block table of its own, and its scheduler walks all groups of all requests in Python
at every step. Groups are as large as the smallest kind of layer is numerous (vllm/v1/core/kv_cache_utils.py). Gemma-4
alone makes 6; its DFlash drafter, with one full layer among sliding ones, makes that 65. The steps here have no model:
one token a request, as in autoregressive steps, with the bundled tokenizer's model standing in for the configuration.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dflash_serve import demo

NUM_BLOCKS = 230_000
PROMPT_TOKENS = 128
WARM_UP_STEPS = 10
REQUESTS = (8, 32, 64, 128)
AR, STOCK, EVEN = "Gemma-4 alone", "with its drafter, as vLLM groups it", "with its drafter, as dflash-serve does"
QUICK = "the same with our KV cache manager"


def mean_schedule_seconds(groups: str, requests: int, steps: int) -> float:
    """Mean time of `Scheduler.schedule` with `requests` that decode one token a step."""
    import torch
    from vllm import SamplingParams
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from dflash_serve.vllm_ext.allocation import quicken

    # Gemma-4-31B and its drafter: pages of one size, so that layers with less a token hold more tokens a block
    sliding: KVCacheSpec = SlidingWindowSpec(
        block_size=16, num_kv_heads=16, head_size=256, dtype=torch.bfloat16, sliding_window=1024
    )
    full: KVCacheSpec = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=512, dtype=torch.bfloat16)
    drafter_sliding: KVCacheSpec = SlidingWindowSpec(
        block_size=64, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, sliding_window=2048
    )
    drafter_full: KVCacheSpec = FullAttentionSpec(block_size=64, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    specs = {
        AR: [sliding] * 5 + [full],
        STOCK: [sliding] * 50 + [full] * 10 + [drafter_sliding] * 4 + [drafter_full],
        EVEN: [sliding] * 10 + [full] * 2 + [drafter_sliding] + [drafter_full],
    }[EVEN if groups == QUICK else groups]

    init_none_hash(sha256)
    cache = CacheConfig(block_size=16, enable_prefix_caching=True)
    cache.num_gpu_blocks = NUM_BLOCKS
    config = VllmConfig(
        model_config=ModelConfig(model=str(demo.ensure_target()), dtype="float32", max_model_len=2048),
        scheduler_config=SchedulerConfig(
            max_num_seqs=256, max_num_batched_tokens=32768, max_model_len=2048, is_encoder_decoder=False
        ),
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
    )
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=NUM_BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([str(index)], spec) for index, spec in enumerate(specs)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=64,
        hash_block_size=16,
    )
    if groups == QUICK:
        assert quicken(scheduler.kv_cache_manager)
    numbers = random.Random(0)
    for index in range(requests):
        request = Request(
            request_id=str(index),
            prompt_token_ids=[numbers.randrange(5, 40_000) for _ in range(PROMPT_TOKENS)],
            sampling_params=SamplingParams(max_tokens=1000, ignore_eos=True),
            pooling_params=None,
            block_hasher=get_request_block_hasher(16, sha256),
        )
        scheduler.add_request(request)
    seconds = []
    for _ in range(steps + WARM_UP_STEPS):
        started = time.perf_counter()
        output = scheduler.schedule()
        seconds.append(time.perf_counter() - started)
        ids = list(output.num_scheduled_tokens)
        sampled = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=[[7]] * len(ids),
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        scheduler.update_from_output(output, sampled)
    return statistics.fmean(seconds[WARM_UP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    table = Table("KV cache groups", *(f"{n} requests, ms" for n in REQUESTS))
    found: dict[str, dict[int, float]] = {}
    for groups, count in track([(AR, 6), (STOCK, 65), (EVEN, 14), (QUICK, 14)], "scheduling", transient=True):
        name = f"{count}: {groups}"
        found[name] = {n: round(1000 * mean_schedule_seconds(groups, n, options.steps), 2) for n in REQUESTS}
        table.add_row(name, *map(str, found[name].values()))
    Console().print(table)
    if options.out is not None:
        about = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine()}
        options.out.write_text(json.dumps({"about": about, "mean_schedule_ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
