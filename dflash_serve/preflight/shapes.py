"""The sizes of a model, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float": 4.0}
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Layer:
    """One attention layer."""

    kv_heads: int
    head_size: int
    window: int | None
    """Tokens that it attends to; None for all."""

    def kv_bytes_per_token(self, kv_dtype_bytes: float, gpus: int = 1) -> int:
        """Keys and values of one token on one of `gpus` that share the heads."""
        return int(2 * max(1, self.kv_heads // gpus) * self.head_size * kv_dtype_bytes)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json."""
    return config.get("text_config") or config


def layers(config: Mapping[str, Any]) -> list[Layer]:
    """The attention layers of a text config, the sharing of KV between layers aside. Raises KeyError."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    full = Layer(config.get("num_global_key_value_heads") or kv_heads, config.get("global_head_dim") or head_size, None)
    sliding = Layer(kv_heads, head_size, config.get("sliding_window"))
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    own = len(kinds) - (config.get("num_kv_shared_layers") or 0)
    return [sliding if kind == SLIDING else full for kind in kinds[:own]]


def parameters(config: Mapping[str, Any], *, embeds: bool) -> int:
    """Weights of a text model, from its config; norms are left out. Raises KeyError.

    Args:
        embeds: Whether it has an embedding and a head of its own, which a DFlash drafter shares with its target.
    """
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    attention = sum(
        # query and output; key and value, of which vLLM keeps both also where they are one in the checkpoint
        2 * hidden * heads * layer.head_size + 2 * hidden * layer.kv_heads * layer.head_size
        for layer in layers(config)
    )
    experts = (config.get("num_experts") or 0) * 3 * hidden * (config.get("moe_intermediate_size") or ffn)
    mlp = config["num_hidden_layers"] * (3 * hidden * ffn + experts)
    vocabulary = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings", True) else 2) if embeds else 0
    features = len((config.get("dflash_config") or {}).get("target_layer_ids") or ()) * hidden * hidden
    return int(attention + mlp + vocabulary + features)


def tower_parameters(config: Mapping[str, Any]) -> int:
    """Weights of a vision or audio tower, from its own config; 0 where its sizes are named otherwise."""
    hidden, ffn, count = (config.get(name) or 0 for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return int(count * (4 * hidden * hidden + 3 * hidden * ffn))


def bytes_per_weight(config: Mapping[str, Any], dtype: str | None) -> float:
    """Of the linear layers; quantized checkpoints say so themselves."""
    quantized = config.get("quantization_config")
    if quantized:
        method = str(quantized.get("quant_method", ""))
        return float(quantized["bits"]) / 8 if "bits" in quantized else 1.0 if "fp8" in method else 0.5
    named = dtype if dtype not in (None, "auto") else text_config(config).get("dtype") or config.get("torch_dtype")
    return BYTES.get(str(named), 2.0)
