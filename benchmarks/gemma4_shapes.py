"""Model folders of Gemma-4's shape: the true one without weights, and a tiny one with random weights.

The true shapes are those of google/gemma-4-31B-it's text model and z-lab/gemma-4-31B-it-DFlash.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DEVIATION = 0.02
"""Standard deviation of random weights, but for norms and tiny embeddings."""


def target_config(*, tiny: bool, vocab_size: int | None = None) -> dict[str, Any]:
    """config.json of the target's text model; every sixth layer has full attention, with keys for values."""
    layers = 12 if tiny else 60
    shape: dict[str, Any] = {
        "vocab_size": 262144,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if tiny:
        shape |= {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 96,
            "max_position_embeddings": 4096,
        }
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **shape,
        **({"vocab_size": vocab_size} if vocab_size else {}),
        "num_hidden_layers": layers,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6),
        "attention_k_eq_v": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "dtype": "float32" if tiny else "bfloat16",
    }


def drafter_config(*, tiny: bool, vocab_size: int | None = None) -> dict[str, Any]:
    """config.json of the drafter; the tiny one has full layers alone, as vLLM's V1 runner cannot mix them."""
    target = target_config(tiny=tiny, vocab_size=vocab_size)
    layers = 2 if tiny else 5
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": target["vocab_size"],
        "hidden_size": target["hidden_size"],
        "intermediate_size": 192 if tiny else 10752,
        "num_hidden_layers": layers,
        "num_attention_heads": 4 if tiny else 64,
        "num_key_value_heads": 2 if tiny else 8,
        "head_dim": 32 if tiny else 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": target["max_position_embeddings"],
        "layer_types": ["full_attention"] * 2 if tiny else ["sliding_attention"] * 4 + ["full_attention"],
        "sliding_window": None if tiny else 2048,
        "use_sliding_window": not tiny,
        "max_window_layers": layers,
        "block_size": 8 if tiny else 16,
        "num_target_layers": target["num_hidden_layers"],
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "dtype": target["dtype"],
        "dflash_config": {"mask_token_id": 4, "target_layer_ids": [0, 5, 9] if tiny else [1, 12, 23, 35, 46, 57]},
    }


def write_pair(folder: Path, *, tiny: bool, tokenizer: Path | None = None) -> tuple[Path, Path]:
    """Folders of target and drafter: config.json, the tokenizer's files when given, random weights when tiny.

    Args:
        tokenizer: A model folder; its vocabulary becomes the tiny pair's.
    """
    target, drafter = folder / "gemma-4-target", folder / "gemma-4-dflash"
    vocab_size = None
    if tokenizer is not None and tiny:
        vocab_size = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    configs = {target: target_config(tiny=tiny, vocab_size=vocab_size)}
    configs[drafter] = drafter_config(tiny=tiny, vocab_size=vocab_size)
    for path, config in configs.items():
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in TOKENIZER_FILES if tokenizer is not None else ():
            if (file := tokenizer / name).is_file():
                shutil.copy(file, path / name)
    if tiny:
        _write_random_weights(target, drafter)
    return target, drafter


def _write_random_weights(target: Path, drafter: Path) -> None:
    """So large that context, normaliser and every layer tell in what is drafted."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    from dflash_serve.training.drafter import DFlashDrafter, DrafterConfig

    torch.manual_seed(0)
    config = json.loads((target / "config.json").read_text())
    model = Gemma4ForCausalLM(Gemma4TextConfig(**config))
    draft = DFlashDrafter(DrafterConfig.from_checkpoint(json.loads((drafter / "config.json").read_text())))
    with torch.no_grad():
        for module in (model, draft):
            for name, parameter in module.named_parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.03 if "embed" in name else 0.15)
    model.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    own = (drafter / "config.json").read_text()
    draft.save(drafter)
    (drafter / "config.json").write_text(own)
