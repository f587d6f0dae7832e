from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen3Config

from dflash_serve.training.attention import document_mask
from dflash_serve.training.target import Target
from tests.unit.training.conftest import CPU


def features_of_documents(target: Target, documents: list[list[int]], layer_ids: tuple[int, ...]) -> torch.Tensor:
    tokens = torch.tensor([[token for document in documents for token in document]])
    starts: list[int] = []
    positions: list[int] = []
    for document in documents:
        starts += [len(starts)] * len(document)
        positions += range(len(document))
    mask = document_mask(torch.tensor([starts]), use_tiles=False)
    return target.features(tokens, torch.tensor([positions]), mask, layer_ids)[0]


def test_features_of_packed_documents_are_hidden_states_of_each_alone(
    llama: tuple[LlamaForCausalLM, Path], target: Target
) -> None:
    documents = [torch.randint(64, (n,)).tolist() for n in (7, 1, 12)]
    packed = features_of_documents(target, documents, (0, 2))
    offset = 0
    for document in documents:
        states = llama[0](torch.tensor([document]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[1], states[3]], dim=-1)[0]
        torch.testing.assert_close(packed[offset : offset + len(document)], expected, rtol=1e-4, atol=1e-4)
        offset += len(document)


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config])
def test_qwen_biases_and_norms(config_class: type[Qwen2Config | Qwen3Config], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
    }
    model = AutoModelForCausalLM.from_config(config_class(**sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    document = torch.randint(64, (9,)).tolist()
    expected = model(torch.tensor([document]), output_hidden_states=True).hidden_states[1][0]
    got = features_of_documents(Target(tmp_path, CPU, torch.float32), [document], (0,))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba' is not one of llama, qwen2, qwen3"):
        Target(tmp_path, CPU, torch.float32)
