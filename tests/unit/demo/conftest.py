"""A tiny Llama: its weights, and the GGUF file that llama.cpp would write of it."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from dflash_serve.demo.convert import LAYER_WEIGHTS, OTHER_WEIGHTS

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 32, 2, 4, 2, 64
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab", "Ġa", "12"]


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """The two halves of each head's rotary rows, interleaved."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    """Hugging Face names and order of rows, float32."""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, 0.1, (rows, columns)).astype(np.float32)

    kv_rows = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv_rows, HIDDEN),
        "self_attn.v_proj": (kv_rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    result = {
        f"model.layers.{i}.{name}.weight": matrix(*shape) for i in range(LAYERS) for name, shape in shapes.items()
    }
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"model.layers.{i}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    result["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    result["model.embed_tokens.weight"] = matrix(len(TOKENS), HIDDEN)
    return result


@pytest.fixture(scope="session")
def tiny_gguf(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ a", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    theirs = {ours: gguf_name for gguf_name, ours in (LAYER_WEIGHTS | OTHER_WEIGHTS).items()}
    for name, value in weights.items():
        parts = name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            part = theirs[".".join(parts[3:])]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part)
            tensor = llama_cpp_order(value, heads) if heads else value
            writer.add_tensor(f"blk.{parts[2]}.{part}.weight", np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(f"{theirs['.'.join(parts)]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
