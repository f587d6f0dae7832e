"""What of a GPU's memory goes where, and how many requests fit: an estimate from config.json alone.

KV blocks as vLLM 0.29 makes them (vllm/v1/core/kv_cache_utils.py): all blocks hold the same bytes; a layer with less
KV a token gets more tokens a block; layers of one kind are split into groups of equal size (`dflash_serve.kv_groups`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from dflash_serve.kv_groups import layers_per_group
from dflash_serve.preflight.shapes import (
    BYTES,
    Layer,
    bytes_per_weight,
    layers,
    parameters,
    text_config,
    tower_parameters,
)
from dflash_serve.settings.model import Settings

BLOCK_TOKENS = 16
GRAPHS_BYTES = 2 * 1024**3
"""CUDA graphs, CUDA's own and the allocator's leavings."""
LENGTHS = (4096, 32768)
IN_FLIGHT_BATCHES = 2
"""vLLM schedules the next step while one runs, and frees no block that either may read."""


@dataclass(frozen=True)
class Group:
    """KV cache groups of one kind: `count` of them, each with a block table of its own."""

    layer: Layer
    count: int
    block_tokens: int

    def held(self, tokens: int) -> int:
        """Blocks of a request with `tokens` of context that is decoding."""
        return self._blocks(tokens, (self.layer.window or 0) - 1)

    def admitted(self, tokens: int, max_in_flight_tokens: int) -> int:
        """Blocks that must be free before a request with `tokens` of prompt is taken up."""
        return self._blocks(tokens, (self.layer.window or 0) - 1 + max_in_flight_tokens)

    def _blocks(self, tokens: int, most: int) -> int:
        every = ceil(tokens / self.block_tokens)
        if self.layer.window is None:
            return self.count * every
        return self.count * min(every, ceil(most / self.block_tokens) + 1)


@dataclass(frozen=True)
class Fit:
    """Requests of one length."""

    tokens: int
    held_bytes: int
    """KV cache of one request while it decodes."""
    admitted_bytes: int
    """KV cache that must be free for one more to be taken up: prefill fills windows with whole chunks."""
    requests: int
    """How many decode at once, the last of them taken up beside the others."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU of a replica."""

    gpu_bytes: int
    usable_bytes: int
    """gpu_memory_utilization of it."""
    weights_bytes: int
    drafter_bytes: int
    working_bytes: int
    """Activations of the largest step, logits, CUDA graphs."""
    kv_bytes: int
    """What is left for the KV cache; below zero when nothing is."""
    kv_bytes_per_token: int
    """Of the layers that keep all tokens: what a request grows by once it is longer than the windows."""
    window_bytes: int
    """Of the layers with a window, once a request is longer than it."""
    fits: tuple[Fit, ...]


def kv_groups(all_layers: Sequence[Layer], kv_dtype_bytes: float, gpus: int) -> tuple[int, list[Group]]:
    """(Bytes of a block, groups) for the layers of target and drafter."""
    kinds = Counter(all_layers)
    page = {kind: BLOCK_TOKENS * kind.kv_bytes_per_token(kv_dtype_bytes, gpus) for kind in kinds}
    if len({kind.window for kind in kinds}) == 1:
        block = sum(page[kind] * count for kind, count in kinds.items())
        return block, [Group(next(iter(kinds)), 1, BLOCK_TOKENS)]
    largest = max(page.values())
    per_group = layers_per_group(list(kinds.values()))
    groups = []
    for kind, count in kinds.items():
        # a page that does not divide the largest is padded to it instead
        times = largest // page[kind] if largest % page[kind] == 0 else 1
        groups.append(Group(kind, ceil(count / per_group), BLOCK_TOKENS * times))
    return per_group * largest, groups


def estimate(
    settings: Settings, target: Mapping[str, Any], drafter: Mapping[str, Any] | None, gpu_bytes: int
) -> Estimate:
    """Where one GPU's memory goes.

    Args:
        target, drafter: Each one's config.json; None without speculation.
        gpu_bytes: Memory of one GPU.

    Raises KeyError for a config.json that does not tell its sizes.
    """
    engine, gpus = settings.engine, settings.hardware.gpus_per_replica
    dtype = engine.get("dtype")
    text = text_config(target)
    weights = parameters(text, embeds=True) * bytes_per_weight(target, dtype)
    if not text_only(engine):
        towers = (target.get(name) or {} for name in ("vision_config", "audio_config"))
        weights += sum(map(tower_parameters, towers)) * BYTES.get(str(dtype), 2.0)
    drafter_weights = parameters(drafter, embeds=False) * bytes_per_weight(drafter, dtype) if drafter else 0.0

    kv_dtype = str(engine.get("kv_cache_dtype", "auto"))
    kv_dtype_bytes = 1.0 if kv_dtype.startswith("fp8") else BYTES.get(kv_dtype, BYTES.get(str(dtype), 2.0))
    all_layers = layers(text) + (layers(drafter) if drafter else [])
    block_bytes, groups = kv_groups(all_layers, kv_dtype_bytes, gpus)

    max_tokens = engine.get("max_num_batched_tokens", 8192)
    working = _working_bytes(settings, text, drafter, max_tokens)
    usable = int(gpu_bytes * engine.get("gpu_memory_utilization", 0.92))
    weights_bytes, drafter_bytes = int(weights / gpus), int(drafter_weights / gpus)
    kv_bytes = usable - weights_bytes - drafter_bytes - working

    longest = engine.get("max_model_len") or text.get("max_position_embeddings", LENGTHS[0])
    fits = []
    for tokens in sorted({min(length, longest) for length in (*LENGTHS, longest)}):
        held = block_bytes * sum(group.held(tokens) for group in groups)
        admitted = block_bytes * sum(group.admitted(tokens, IN_FLIGHT_BATCHES * max_tokens) for group in groups)
        requests = 1 + (kv_bytes - admitted) // held if kv_bytes >= admitted else 0
        fits.append(Fit(tokens, held, admitted, requests))
    growing = sum(x.kv_bytes_per_token(kv_dtype_bytes, gpus) for x in all_layers if x.window is None)
    windows = sum(x.window * x.kv_bytes_per_token(kv_dtype_bytes, gpus) for x in all_layers if x.window)
    return Estimate(gpu_bytes, usable, weights_bytes, drafter_bytes, working, kv_bytes, growing, windows, tuple(fits))


def text_only(engine: Mapping[str, Any]) -> bool:
    """Whether the engine is told to take no images, audio or video."""
    limits = engine.get("limit_mm_per_prompt")
    if engine.get("language_model_only"):
        return True
    return isinstance(limits, Mapping) and all(limits.get(kind) == 0 for kind in ("image", "audio", "video"))


def _working_bytes(
    settings: Settings, text: Mapping[str, Any], drafter: Mapping[str, Any] | None, max_tokens: int
) -> int:
    """vLLM measures this with a step of `max_num_batched_tokens`; here the tensors that are largest then."""
    hidden, ffn = text["hidden_size"], text["intermediate_size"]
    gate_and_up = 2 * ffn + ffn
    features = len((drafter.get("dflash_config") or {}).get("target_layer_ids") or ()) * hidden if drafter else 0
    # the features once by layer and once joined
    a_token = 2 * (gate_and_up + 6 * hidden + 2 * features)
    sampled = settings.engine.get("max_num_seqs", 256) * (
        1 + (settings.speculation.max_draft_tokens if settings.speculates else 0)
    )
    # logits in the model's dtype, in float32, and sorted or softmaxed once
    logits = min(sampled, max_tokens) * text["vocab_size"] * (2 + 4 + 4)
    return int(max_tokens * a_token / settings.hardware.gpus_per_replica) + logits + GRAPHS_BYTES
