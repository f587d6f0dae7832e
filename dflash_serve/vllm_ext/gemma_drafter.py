"""Gemma's embedding normaliser for vLLM's DFlash drafter.

The drafter shares the target's embedding matrix, and Gemma multiplies what it looks up there by √hidden_size in its own
`embed_input_ids`, which the drafter does not call. vLLM 0.29 to 0.33 leave that out (vLLM pull request 41703, open).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

from dflash_serve.vllm_ext.cpu_drafter import CpuDFlashModel

logger = logging.getLogger("vllm.dflash_serve")


class _Normalised:
    """Goes before a drafter model; `hidden_size` is the target's, as they share the embedding."""

    normalizer: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        scale = vllm_config.model_config.hf_text_config.hidden_size**0.5
        if vllm_normalises(self):
            logger.info("DFlash drafter: vLLM normalises Gemma's embeddings itself; dflash-serve stands aside")
            scale = 1.0
        # rounded to the model's dtype, as Gemma's own is; not persistent, so that dummy weights leave it alone
        normalizer = torch.tensor(scale, dtype=vllm_config.model_config.dtype)  # type: ignore[arg-type]
        self.register_buffer("normalizer", normalizer, persistent=False)  # type: ignore[attr-defined]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = super().embed_input_ids(input_ids)  # type: ignore[misc]
        return embeddings * self.normalizer

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, input_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        # A function of our own: vLLM files compiled models under the name of `forward` (_model_hash_key in
        # vllm/compilation/decorators.py), and would load what it compiled without the normaliser.
        hidden: torch.Tensor = super().forward(input_ids, positions, input_embeds)  # type: ignore[misc]
        return hidden


class GemmaDFlashModel(_Normalised, DFlashQwen3Model):
    pass


class CpuGemmaDFlashModel(_Normalised, CpuDFlashModel):
    pass


def vllm_normalises(model: Any) -> bool:
    """Whether the drafter model that we extend does more with embeddings than look them up."""
    ones: Any = _OnesForEmbeddings(model)
    looked_up = DFlashQwen3Model.embed_input_ids(ones, torch.zeros(1, dtype=torch.long))
    return not torch.equal(looked_up, torch.ones_like(looked_up))


class _OnesForEmbeddings:
    """A drafter model whose embedding matrix is all ones."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @staticmethod
    def embed_tokens(input_ids: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(input_ids), 1)
