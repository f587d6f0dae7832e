"""GGUF -> Hugging Face, on the tiny model of conftest.py."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from dflash_serve.demo.convert import convert, model_config, rotary_halves, weight_name


@pytest.fixture(scope="module")
def folder(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf")
    convert(tiny_gguf, out, lambda what, share: None)
    return out


def test_every_weight_comes_back(weights: dict[str, np.ndarray], folder: Path) -> None:
    """Among them q and k, whose rows conftest.py mixes as llama.cpp does."""
    import torch
    from safetensors.torch import load_file

    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(loaded[name], torch.from_numpy(value).to(torch.bfloat16)), name


def test_rotary_order_is_undone() -> None:
    """Two heads of four rows, written out: GGUF has 0, 2, 1, 3 where Hugging Face has 0, 1, 2, 3."""
    mixed = np.array([0, 2, 1, 3, 4, 6, 5, 7], dtype=np.float32)[:, None]
    assert rotary_halves(mixed, 2).ravel().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "rope_freqs.weight", "blk.0.ffn_gate_exps.weight", "odd"])
def test_a_tensor_that_would_be_lost_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"not of a plain Llama: {name}"):
        weight_name(name)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="only Llama-family GGUF files can be converted, not 'qwen2'"):
        model_config(gguf.GGUFReader(tmp_path / "other.gguf"))


def test_transformers_reads_the_folder(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.config.rms_norm_eps == 1e-5
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("ab 12 a<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids) == "ab 12 a<|im_end|>"
    # "12" is in the vocabulary: digits stand alone all the same
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "1", "2", "Ġa", "<|im_end|>"]
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
