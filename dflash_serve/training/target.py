"""The target: a Llama- or Qwen-like causal language model, read from a Hugging Face folder.

Written out here, not taken from transformers, because training needs two things that its classes do not give cheaply:
hidden states of chosen layers for packed rows, and a batched greedy decode whose cache is read only up to its present
length. Its results are tested equal to transformers'.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from dflash_serve.training.attention import Mask, attend

SUPPORTED = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class TargetConfig:
    """Shape of the target, from its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int

    @classmethod
    def from_folder(cls, folder: Path) -> "TargetConfig":
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"target: no config.json in {folder}; give a Hugging Face model folder")
        raw: dict[str, Any] = json.loads(path.read_text())
        if raw.get("model_type") not in SUPPORTED:
            raise ValueError(f"target: model_type {raw.get('model_type')!r} is not one of {', '.join(SUPPORTED)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"target: rope_type {rope_type!r} is not supported; only plain RoPE ('default') is")
        if raw.get("use_sliding_window"):
            raise ValueError("target: sliding-window attention is not supported")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or raw["rope_theta"]),
            max_positions=raw["max_position_embeddings"],
        )


class LayerWeights(NamedTuple):
    """Weights of one decoder layer; q, k, v and gate, up are joined so that each is one matrix product."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_norm: Tensor
    gate_up: Tensor
    down: Tensor


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, head_dim] for positions [...] (rotate-half layout, heads broadcast)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def decoder_layer(
    x: Tensor, weights: LayerWeights, cos: Tensor, sin: Tensor, config: TargetConfig, attention: Attend
) -> Tensor:
    """One decoder layer on x [B, T, hidden]. `attention` gets [B, heads, T, d] and twice [B, kv_heads, T, d]."""
    batch, length, _ = x.shape
    d, eps = config.head_dim, config.rms_norm_eps
    normed = F.rms_norm(x, (config.hidden_size,), weights.input_norm, eps)
    qkv = F.linear(normed, weights.qkv, weights.qkv_bias).view(batch, length, -1, d)
    query, key, value = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
    if weights.query_norm is not None and weights.key_norm is not None:
        query = F.rms_norm(query, (d,), weights.query_norm, eps)
        key = F.rms_norm(key, (d,), weights.key_norm, eps)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    attended = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, -1), weights.output)
    gate, up = F.linear(F.rms_norm(x, (config.hidden_size,), weights.output_norm, eps), weights.gate_up).chunk(
        2, dim=-1
    )
    return x + F.linear(F.silu(gate) * up, weights.down)


def packed_layer(
    x: Tensor, weights: LayerWeights, cos: Tensor, sin: Tensor, config: TargetConfig, mask: Mask
) -> Tensor:
    """`decoder_layer` over packed rows; a function of tensors only, so that one compilation serves every layer."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # `value` is a view into the joined projection; compiled flex attention on a CPU reads such a view from the
        # wrong place (seen with torch 2.11 and 2.13), so it gets its own storage.
        return attend(query, key, value.contiguous(), mask)

    return decoder_layer(x, weights, cos, sin, config, attention)


class Target:
    """Frozen weights of the target on one device.

    Attributes:
        embedding: [vocab, hidden]; head: [vocab, hidden] (the same tensor when tied).
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder = folder
        self.config = TargetConfig.from_folder(folder)
        self.device, self.dtype = device, dtype
        tensors = _read_weights(folder, device, dtype)
        self.embedding = tensors["model.embed_tokens.weight"]
        self.head = tensors.get("lm_head.weight", self.embedding)
        self.norm = tensors["model.norm.weight"]
        self.layers = [_layer_weights(tensors, i) for i in range(self.config.num_layers)]
        self._packed_layer = torch.compile(packed_layer, dynamic=False) if device.type == "cuda" else packed_layer

    @torch.no_grad()
    def features(self, tokens: Tensor, positions: Tensor, mask: Mask, layer_ids: Iterable[int]) -> Tensor:
        """Hidden states after the layers `layer_ids`, joined: [R, C, len(layer_ids) * hidden].

        Args:
            tokens, positions: [R, C]; positions count from 0 in each document.
            mask: from `document_mask`.
        """
        wanted = sorted(layer_ids)
        x = F.embedding(tokens, self.embedding)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, self.dtype)
        kept = []
        for i, weights in enumerate(self.layers[: wanted[-1] + 1]):
            x = self._packed_layer(x, weights, cos, sin, self.config, mask)
            if i in wanted:
                kept.append(x)
        return torch.cat(kept, dim=-1)

    def next_tokens(self, x: Tensor) -> Tensor:
        """Greedy next token [B] after the last hidden state x [B, hidden]."""
        normed = F.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)
        return F.linear(normed, self.head).argmax(dim=-1)


def _read_weights(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"target: no *.safetensors in {folder}")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensors[name] = file.get_tensor(name).to(device=device, dtype=dtype)
    return tensors


def _layer_weights(tensors: dict[str, Tensor], index: int) -> LayerWeights:
    prefix = f"model.layers.{index}."
    attention = prefix + "self_attn."
    bias = None
    if f"{attention}q_proj.bias" in tensors:
        bias = torch.cat([tensors[f"{attention}{name}_proj.bias"] for name in "qkv"])
    return LayerWeights(
        input_norm=tensors[prefix + "input_layernorm.weight"],
        qkv=torch.cat([tensors[f"{attention}{name}_proj.weight"] for name in "qkv"]),
        qkv_bias=bias,
        query_norm=tensors.get(attention + "q_norm.weight"),
        key_norm=tensors.get(attention + "k_norm.weight"),
        output=tensors[attention + "o_proj.weight"],
        output_norm=tensors[prefix + "post_attention_layernorm.weight"],
        gate_up=torch.cat([tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]),
        down=tensors[prefix + "mlp.down_proj.weight"],
    )
