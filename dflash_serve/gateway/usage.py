"""Token counts out of vLLM's response objects, and speculation into the usage that OpenAI documents.

With the engine option `per_request_spec_decode_metrics: summary` vLLM puts `metrics.speculative_decoding` beside
`usage` (`SpeculativeDecodingMetrics` in vllm/entrypoints/generate/base/protocol.py) for chat and text completions of
one sequence. OpenAI's own fields for speculation are `usage.completion_tokens_details.{accepted,rejected}
_prediction_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_serve.gateway.record import RequestRecord


def note_usage(record: RequestRecord, payload: Mapping[str, Any]) -> None:
    """Copy the counts of a response object, or of an event that carries usage, into the record."""
    usage = payload.get("usage")
    if isinstance(usage, Mapping):
        if "input_tokens" in usage:  # Responses; Anthropic, which counts cached tokens apart
            cached = ("cache_read_input_tokens", "cache_creation_input_tokens")
            record.prompt_tokens = sum(_count(usage, name) or 0 for name in ("input_tokens", *cached))
            record.completion_tokens = _count(usage, "output_tokens")
        else:
            record.prompt_tokens = _count(usage, "prompt_tokens")
            record.completion_tokens = _count(usage, "completion_tokens")
    speculation = _speculation(payload)
    if speculation is not None:
        record.num_drafts = _count(speculation, "num_spec_steps")
        record.draft_tokens = _count(speculation, "num_draft_tokens")
        record.accepted_tokens = _count(speculation, "num_accepted_draft_tokens")


def fold_speculation(payload: dict[str, Any]) -> bool:
    """Add the prediction tokens to `payload["usage"]`, beside what is there; False when there is nothing to add."""
    usage, speculation = payload.get("usage"), _speculation(payload)
    if not isinstance(usage, dict) or speculation is None:
        return False
    drafted, accepted = _count(speculation, "num_draft_tokens"), _count(speculation, "num_accepted_draft_tokens")
    if drafted is None or accepted is None:
        return False
    usage["completion_tokens_details"] = {
        **(usage.get("completion_tokens_details") or {}),
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": drafted - accepted,
    }
    return True


def _speculation(payload: Mapping[str, Any]) -> Mapping[str, Any] | None:
    metrics = payload.get("metrics")
    speculation = metrics.get("speculative_decoding") if isinstance(metrics, Mapping) else None
    return speculation if isinstance(speculation, Mapping) else None


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) else None
