"""The DFlash drafter (arXiv 2602.06036): drafts a block of tokens in one forward pass, from the target's hidden states.

Context: for every token that the target has processed, the hidden states after `target_layer_ids`, joined, go through
`fc` and `hidden_norm`; each layer projects that tensor to its keys and values (with no `input_layernorm`).
Block: at positions P .. P + block_size - 1 the input is [bonus token, mask, mask, ...], P being the number of context
tokens. Slots see the whole context and each other, both ways. The mask slot at position p predicts the token at p.
The token embedding and the output head are the target's, frozen and not part of the checkpoint.

Parameter names are those of the checkpoint, which vLLM loads as `DFlashDraftModel`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dflash_serve.training.attention import Mask, attend
from dflash_serve.training.target import TargetConfig, rotary_tables, rotate


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a drafter. Everything that the target does not choose is in the last four fields."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    num_target_layers: int
    num_layers: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int

    @classmethod
    def for_target(
        cls, target: TargetConfig, num_layers: int, block_size: int, target_layer_ids: Sequence[int], mask_token_id: int
    ) -> "DrafterConfig":
        if block_size < 2:
            raise ValueError(f"block_size: {block_size} leaves no slot to draft in; give 2 or more")
        if not target_layer_ids or not all(0 <= i < target.num_layers for i in target_layer_ids):
            raise ValueError(f"target_layer_ids: {list(target_layer_ids)} must lie in 0..{target.num_layers - 1}")
        if not 0 <= mask_token_id < target.vocab_size:
            raise ValueError(f"mask_token_id: {mask_token_id} is outside the vocabulary of {target.vocab_size}")
        return cls(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta,
            max_positions=target.max_positions,
            num_target_layers=target.num_layers,
            num_layers=num_layers,
            block_size=block_size,
            target_layer_ids=tuple(sorted(target_layer_ids)),
            mask_token_id=mask_token_id,
        )

    def to_checkpoint(self) -> dict[str, Any]:
        """The checkpoint's config.json, in the form that vLLM reads."""
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"] * self.num_layers,
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "dflash_config": {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids)},
        }

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any]) -> "DrafterConfig":
        if raw.get("architectures") != ["DFlashDraftModel"]:
            raise ValueError(f"drafter: architectures {raw.get('architectures')} is not ['DFlashDraftModel']")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=raw["head_dim"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=raw["rope_theta"],
            max_positions=raw["max_position_embeddings"],
            num_target_layers=raw["num_target_layers"],
            num_layers=raw["num_hidden_layers"],
            block_size=raw["block_size"],
            target_layer_ids=tuple(raw["dflash_config"]["target_layer_ids"]),
            mask_token_id=raw["dflash_config"]["mask_token_id"],
        )


class Linear(nn.Linear):
    """No bias. Weights stay float32; the product is taken in the input's dtype."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, key_size)
        self.v_proj = Linear(config.hidden_size, key_size)
        self.o_proj = Linear(query_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, block: Tensor, context: Tensor, block_rotary: Rotary, context_rotary: Rotary, mask: Mask
    ) -> Tensor:
        query = rotate(self.q_norm(self._heads(self.q_proj(block))), *block_rotary)
        context_key = rotate(self.k_norm(self._heads(self.k_proj(context))), *context_rotary)
        block_key = rotate(self.k_norm(self._heads(self.k_proj(block))), *block_rotary)
        key = torch.cat([context_key, block_key], dim=1)
        value = self._heads(torch.cat([self.v_proj(context), self.v_proj(block)], dim=1))
        attended = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DrafterLayer(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, block: Tensor, context: Tensor, block_rotary: Rotary, context_rotary: Rotary, mask: Mask
    ) -> Tensor:
        block = block + self.self_attn(self.input_layernorm(block), context, block_rotary, context_rotary, mask)
        return block + self.mlp(self.post_attention_layernorm(block))


class DFlashDrafter(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = Linear(config.hidden_size * len(config.target_layer_ids), config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DrafterLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, features: Tensor, context_positions: Tensor, block: Tensor, block_positions: Tensor, mask: Mask
    ) -> Tensor:
        """Hidden states of all blocks of packed rows; the target's head makes logits of them.

        Args:
            features: [R, C, hidden * len(target_layer_ids)], the target's hidden states of the context.
            context_positions: [R, C], each token's position in its document.
            block: [R, Q, hidden], the target's embedding of the blocks' tokens.
            block_positions: [R, Q].
            mask: from `anchor_mask`.

        Returns:
            [R, Q, hidden], in the dtype of `block`.
        """
        context = self.hidden_norm(self.fc(features))
        block_rotary = rotary_tables(block_positions, self.config.head_dim, self.config.rope_theta, block.dtype)
        context_rotary = rotary_tables(context_positions, self.config.head_dim, self.config.rope_theta, block.dtype)
        if torch.is_grad_enabled() and not block.requires_grad:
            # Else the first layer alone would have an input with no gradient, and be compiled apart from the others.
            block = block.detach().requires_grad_()
        for layer in self.layers:
            block = layer(block, context, block_rotary, context_rotary, mask)
        return self.norm(block)

    def compile_layers(self) -> None:
        """Compile the layers' forward pass. They share their code, so it is compiled once."""
        for layer in self.layers:
            layer.compile(dynamic=False)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, folder: Path) -> None:
        """Write config.json and bfloat16 model.safetensors, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.state_dict().items()}
        part = folder / "model.part"
        save_file(weights, part, metadata={"format": "pt"})
        os.replace(part, folder / "model.safetensors")
        part.write_text(json.dumps(self.config.to_checkpoint(), indent=2) + "\n")
        os.replace(part, folder / "config.json")

    def load_checkpoint(self, folder: Path) -> None:
        """Take the (bfloat16) weights of a checkpoint; parameters stay float32."""
        weights = load_file(_checkpoint_file(folder, "model.safetensors"))
        self.load_state_dict({name: tensor.float() for name, tensor in weights.items()})

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "DFlashDrafter":
        """Read a checkpoint folder."""
        drafter = cls(DrafterConfig.from_checkpoint(json.loads(_checkpoint_file(folder, "config.json").read_text())))
        drafter.load_checkpoint(folder)
        return drafter.to(device)


def _checkpoint_file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"drafter: {folder} has no {name}")
    return folder / name
