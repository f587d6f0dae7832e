"""Accepted draft tokens, from whichever of these a server gives, the first that is there:

1. `metrics.speculative_decoding` of a response (vLLM with `per_request_spec_decode_metrics`; ours has it on)
2. `usage.completion_tokens_details.accepted_prediction_tokens` of a response
3. counters at `/metrics`, after less before (vLLM, also through Ray's metrics agent; SGLang)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dflash_serve.speculation.acceptance import AcceptanceCounts

VLLM = ("vllm:spec_decode_", "ray_vllm_spec_decode_")
SGLANG_VERIFICATIONS = "sglang:spec_verify_calls_total"
SGLANG_TOKENS = "sglang:generation_tokens_total"


def from_response(payload: Mapping[str, Any]) -> AcceptanceCounts | None:
    """Counts of one response, or of the stream's event that carries usage; None when it does not speak of drafts.

    From `usage` alone verifications are inferred: each gives one token beside those accepted, and the prompt's pass
    gives the first (exact unless the last verification was cut off at the token limit).
    """
    metrics = payload.get("metrics")
    speculation = metrics.get("speculative_decoding") if isinstance(metrics, Mapping) else None
    if isinstance(speculation, Mapping):
        return AcceptanceCounts(
            speculation["num_spec_steps"],
            speculation["num_draft_tokens"],
            speculation["num_accepted_draft_tokens"],
            accepted_per_position(speculation.get("acceptance_histogram") or []),
        )
    usage = payload.get("usage") or {}
    details = usage.get("completion_tokens_details") or {}
    accepted = details.get("accepted_prediction_tokens")
    if accepted is None:
        return None
    drafted = accepted + (details.get("rejected_prediction_tokens") or 0)
    if drafted == 0:  # OpenAI's own API and others say 0 where nothing speculates
        return None
    return AcceptanceCounts(max(usage["completion_tokens"] - 1 - accepted, 0), drafted, accepted)


def accepted_per_position(histogram: list[int]) -> list[int]:
    """`histogram[j]` verifications accepted exactly j tokens -> verifications that accepted draft token i (from 0)."""
    return [sum(histogram[position + 1 :]) for position in range(len(histogram) - 1)]


@dataclass
class Counters:
    """A server's totals at one moment; `sglang_tokens` in place of accepted tokens, which SGLang does not count."""

    verifications: float = 0
    draft_tokens: float = 0
    accepted_tokens: float = 0
    per_position: dict[int, float] = field(default_factory=dict)
    sglang_tokens: float | None = None


def parse_metrics(text: str) -> Counters:
    """What a Prometheus page says of speculation, all replicas together; a counter appears with its first increment.

    Raises ValueError when it is no such page.
    """
    counters = Counters()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == SGLANG_VERIFICATIONS:
                counters.verifications += sample.value
            elif sample.name == SGLANG_TOKENS:
                counters.sglang_tokens = (counters.sglang_tokens or 0) + sample.value
            else:
                _add_vllm(counters, sample.name, sample.labels, sample.value)
    return counters


def _add_vllm(counters: Counters, name: str, labels: Mapping[str, str], value: float) -> None:
    prefix = next((prefix for prefix in VLLM if name.startswith(prefix)), None)
    match name.removeprefix(prefix) if prefix else None:
        case "num_drafts_total":
            counters.verifications += value
        case "num_draft_tokens_total":
            counters.draft_tokens += value
        case "num_accepted_tokens_total":
            counters.accepted_tokens += value
        case "num_accepted_tokens_per_pos_total":
            position = int(labels["position"])
            counters.per_position[position] = counters.per_position.get(position, 0) + value


def between(before: Counters, after: Counters, num_requests: int) -> AcceptanceCounts | None:
    """Counts of the time between two readings; None when nothing was verified.

    `num_requests` finished in between: SGLang's generated tokens count each one's first, which no verification gave.
    """
    verifications = round(after.verifications - before.verifications)
    if verifications <= 0:
        return None
    if after.sglang_tokens is not None:
        generated = round(after.sglang_tokens - (before.sglang_tokens or 0))
        return AcceptanceCounts(verifications, 0, max(generated - num_requests - verifications, 0))
    positions = range(max(after.per_position, default=-1) + 1)
    return AcceptanceCounts(
        verifications,
        round(after.draft_tokens - before.draft_tokens),
        round(after.accepted_tokens - before.accepted_tokens),
        [round(after.per_position.get(p, 0) - before.per_position.get(p, 0)) for p in positions],
    )
