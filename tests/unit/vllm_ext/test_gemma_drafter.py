"""Which mends a drafter gets, what they do, and that they stand aside."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

from dflash_serve.gemma import conventions
from dflash_serve.vllm_ext import plugin
from dflash_serve.vllm_ext.cpu_drafter import CpuDFlashModel
from dflash_serve.vllm_ext.drafter import model_class
from dflash_serve.vllm_ext.gemma_drafter import CpuGemmaDFlashModel, GemmaDFlashModel, vllm_normalises

HIDDEN = 5376


def test_conventions_are_gemmas_alone() -> None:
    gemma = conventions("gemma4_text", HIDDEN, 30.0)
    assert gemma is not None
    assert gemma.embedding_scale == pytest.approx(73.32, abs=0.01)
    assert gemma.logit_cap == 30.0
    assert conventions("qwen3", HIDDEN, None) is None
    assert conventions("llama", HIDDEN, None) is None


def test_for_other_targets_the_model_is_vllms() -> None:
    assert model_class(gemma=False, cpu=False) is DFlashQwen3Model
    assert model_class(gemma=False, cpu=True) is CpuDFlashModel
    assert model_class(gemma=True, cpu=False) is GemmaDFlashModel
    both = model_class(gemma=True, cpu=True)
    assert both is CpuGemmaDFlashModel
    assert both._normalize_context_k is CpuDFlashModel._normalize_context_k


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our drafter model without vLLM's layers: its own part, on an embedding of ones."""

    def bare(self: Any, **_: Any) -> None:
        torch.nn.Module.__init__(self)
        self.has_separate_mask_embedding = False
        self.mask_token_id = 4
        self.embed_tokens = lambda ids: torch.ones(len(ids), HIDDEN, dtype=torch.bfloat16)

    monkeypatch.setattr(DFlashQwen3Model, "__init__", bare)
    target = SimpleNamespace(hf_text_config=SimpleNamespace(hidden_size=HIDDEN), dtype=torch.bfloat16)

    def make() -> Any:
        return GemmaDFlashModel(vllm_config=SimpleNamespace(model_config=target))  # type: ignore[arg-type]

    return make


def test_embeddings_are_scaled_as_gemma_rounds_it(model: Any) -> None:
    embedded = model().embed_input_ids(torch.tensor([7, 4]))
    assert embedded.dtype == torch.bfloat16
    # √5376 = 73.32, and bfloat16 has 73.5
    assert embedded.unique().tolist() == [73.5]


def test_it_stands_aside_when_vllm_normalises(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not vllm_normalises(model())
    looked_up = DFlashQwen3Model.embed_input_ids
    monkeypatch.setattr(DFlashQwen3Model, "embed_input_ids", lambda self, ids: looked_up(self, ids) * 73.5)
    assert model().embed_input_ids(torch.tensor([7])).unique().tolist() == [73.5]


def test_compiled_models_are_not_taken_for_vllms() -> None:
    from vllm.compilation.decorators import _model_hash_key

    assert _model_hash_key(GemmaDFlashModel.forward) != _model_hash_key(DFlashQwen3Model.forward)


def test_the_plugin_takes_the_place_of_the_class_that_it_extends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models: dict[str, Any] = dict(ModelRegistry.models)
    monkeypatch.setattr(ModelRegistry, "models", models)
    stock = type(models["DFlash2DraftModel"])("vllm.model_executor.models.qwen3_dflash", "DFlashQwen3ForCausalLM")
    models[plugin.DRAFTER_ARCHITECTURE] = stock
    plugin.register()
    plugin.register()  # vLLM may load plugins more than once
    ours = models[plugin.DRAFTER_ARCHITECTURE]
    assert f"{ours.module_name}:{ours.class_name}" == plugin.DRAFTER
    assert caplog.records == []

    later = type(stock)("vllm.model_executor.models.dflash", "DFlashForCausalLM")
    models[plugin.DRAFTER_ARCHITECTURE] = later
    plugin.register()
    assert models[plugin.DRAFTER_ARCHITECTURE] is later
