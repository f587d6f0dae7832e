import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dflash_serve.training.drafter import DFlashDrafter, DrafterConfig
from dflash_serve.training.target import Target, TargetConfig
from tests.unit.training.conftest import CPU

SMOLLM2_135M = TargetConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    max_positions=8192,
)


def test_checkpoint_round_trip(drafter: DFlashDrafter, tmp_path: Path) -> None:
    drafter.save(tmp_path)
    again = DFlashDrafter.load(tmp_path, CPU)
    assert again.config == drafter.config
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16().float())


def test_checkpoint_has_the_names_and_fields_that_vllm_reads(drafter: DFlashDrafter, tmp_path: Path) -> None:
    drafter.save(tmp_path)
    layer = [f"self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer += [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    expected = {f"layers.{i}.{name}" for i in range(2) for name in layer}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == expected | {"fc.weight", "hidden_norm.weight", "norm.weight"}
        assert file.get_tensor("fc.weight").dtype == torch.bfloat16
        assert list(file.get_tensor("fc.weight").shape) == [24, 72]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"mask_token_id": 5, "target_layer_ids": [0, 2, 3]}
    assert config["block_size"] == 8
    assert config["num_target_layers"] == 4


@pytest.mark.parametrize(("layers", "parameters"), [(3, 12_280_704), (4, 15_820_928)])
def test_size_of_the_bundled_shapes(layers: int, parameters: int) -> None:
    config = DrafterConfig.for_target(SMOLLM2_135M, layers, 16, (1, 8, 14, 20, 27), 4)
    with torch.device("meta"):
        count = sum(p.numel() for p in DFlashDrafter(config).parameters())
    assert count == parameters
    assert 2 * count + 8192 < 32_000_000  # bfloat16, and a generous header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layer_ids": (1, 30)}, "target_layer_ids: .* must lie in 0..29"),
        ({"mask_token_id": 49152}, "mask_token_id: 49152 is outside"),
        ({"block_size": 1}, "block_size: 1 leaves no slot"),
    ],
)
def test_bad_shapes_are_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, Any] = {"num_layers": 1, "block_size": 16, "target_layer_ids": (1, 8), "mask_token_id": 4} | change
    with pytest.raises(ValueError, match=message):
        DrafterConfig.for_target(SMOLLM2_135M, **given)


def test_missing_checkpoint_names_the_file(tmp_path: Path, target: Target) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        DFlashDrafter.load(tmp_path, CPU)
