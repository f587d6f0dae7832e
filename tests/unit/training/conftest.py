"""A tiny random target (float32, CPU) and a drafter for it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dflash_serve.training.drafter import DFlashDrafter, DrafterConfig
from dflash_serve.training.target import Target

CPU = torch.device("cpu")
# models this small gain nothing from threads, and on a busy machine wait long for them
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("target")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def target(llama: tuple[LlamaForCausalLM, Path]) -> Target:
    return Target(llama[1], CPU, torch.float32)


@pytest.fixture
def drafter(target: Target) -> DFlashDrafter:
    torch.manual_seed(2)
    config = DrafterConfig.for_target(
        target.config, num_layers=2, block_size=8, target_layer_ids=(0, 2, 3), mask_token_id=5
    )
    drafter = DFlashDrafter(config)
    with torch.no_grad():
        for parameter in drafter.parameters():  # norms too, so that a norm left out or swapped shows
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return drafter
