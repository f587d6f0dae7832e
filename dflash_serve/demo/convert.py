"""GGUF of a Llama-family model -> a Hugging Face folder (bf16 safetensors, tokenizer, chat template)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

    from dflash_serve.demo.cache import Step

CONTROL_TOKEN = 3
"""gguf.TokenType.CONTROL: tokens that text never spells."""

LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_WEIGHTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def convert(gguf: Path, folder: Path, step: Step) -> None:
    """Write `gguf` as a Hugging Face model into the existing `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    write_tokenizer(reader, folder)
    config = model_config(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    write_weights(reader, config, folder, step)


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """`config.json` out of the file's metadata. Raises ValueError for another architecture than Llama's."""
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"only Llama-family GGUF files can be converted, not {architecture!r}")
    heads = _field(reader, "llama.attention.head_count")
    hidden_size = _field(reader, "llama.embedding_length")
    names = {tensor.name for tensor in reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # stored as float32: 1e-5 comes back as 9.99…e-06
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def write_weights(reader: GGUFReader, config: dict[str, Any], folder: Path, step: Step) -> None:
    """Dequantise every tensor to bf16 and write model.safetensors. Raises OSError when the disk does not take it."""
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # safetensors.numpy knows no bf16

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for number, tensor in enumerate(reader.tensors, start=1):
        name = weight_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = rotary_halves(values, heads[part])
        weights[name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        step("dequantising", number / len(reader.tensors))
    step("writing", 0)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"model.safetensors: {error}") from None
    step("writing", 1)


def weight_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises ValueError for one that a plain Llama does not have."""
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_WEIGHTS:
            return f"model.layers.{layer}.{LAYER_WEIGHTS[part]}.weight"
        case [part, "weight"] if part in OTHER_WEIGHTS:
            return f"{OTHER_WEIGHTS[part]}.weight"
    raise ValueError(f"the GGUF file has a tensor that is not of a plain Llama: {gguf_name}")


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows for interleaved rotary pairs: Hugging Face has a head's two halves one by one.

    weight: [heads * head_dim, hidden]; rows (i, i + head_dim/2) of a head lie side by side in GGUF
    (llama.cpp, convert_hf_to_gguf.py, `LlamaModel.permute`).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of SmolLM2's byte-level BPE: each digit stands alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    flavour = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if flavour != ("gpt2", "smollm"):
        raise ValueError(f"only SmolLM's tokenizer can be converted, not {flavour}")
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    roles = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    config = {f"{role}_token": tokens[_field(reader, f"tokenizer.ggml.{key}")] for role, key in roles.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no {key}")
    return field.contents()
