"""What Gemma does otherwise than Llama and Qwen, and a drafter that shares its embedding and head must do too.

Source: Gemma's model files in transformers and vLLM (vllm/model_executor/models/gemma4.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conventions:
    """What stands between a Gemma's shared weights and its hidden states and logits."""

    embedding_scale: float
    """√hidden_size, not yet rounded to the model's dtype."""
    logit_cap: float | None
    """Logits are cap · tanh(logits / cap); None where the model does not cap."""


def is_gemma(model_type: str | None) -> bool:
    """Whether `model_type` of a text model's config.json is a Gemma: gemma2, gemma3_text, gemma4_text, …"""
    return (model_type or "").startswith("gemma")


def conventions(model_type: str | None, hidden_size: int, final_logit_softcapping: float | None) -> Conventions | None:
    """The conventions of a target, from its text config; None for one that is no Gemma."""
    return Conventions(hidden_size**0.5, final_logit_softcapping) if is_gemma(model_type) else None
