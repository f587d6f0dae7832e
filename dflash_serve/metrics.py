"""Every metric that we export: names, types, units and labels, in one place.

Ray's metrics agent prefixes each name with `ray_`, adds `_total` to counters and the labels `SessionName`,
`NodeAddress`, `WorkerId`, … of its own. Labels here are bounded by construction: a model, a replica, an outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BASE_LABELS = ("model", "replica")


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = BASE_LABELS
    boundaries: tuple[float, ...] = ()

    @property
    def exported_name(self) -> str:
        """As Prometheus sees it (a histogram's series add `_bucket`, `_sum`, `_count`)."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


ACCEPTANCE_LENGTH = Metric(
    "dflash_acceptance_length",
    "gauge",
    "Tokens per verification, bonus token included, over the window; absent while nothing was verified.",
)
VERIFICATIONS = Metric("dflash_verifications", "counter", "Verifications: target passes that checked draft tokens.")
DRAFT_TOKENS = Metric("dflash_draft_tokens", "counter", "Draft tokens proposed to the target.")
ACCEPTED_TOKENS = Metric("dflash_accepted_tokens", "counter", "Draft tokens that the target accepted.")
RUNNING_REQUESTS = Metric("dflash_running_requests", "gauge", "Requests in the engine's running batch.")
WAITING_REQUESTS = Metric("dflash_waiting_requests", "gauge", "Requests that wait for the engine.")
KV_CACHE_USAGE = Metric("dflash_kv_cache_usage_ratio", "gauge", "Share of the KV cache in use, 0 to 1.")
REQUESTS = Metric(
    "dflash_requests",
    "counter",
    "Requests by how they ended: ok, rejected (4xx by us), error, disconnected.",
    labels=(*BASE_LABELS, "outcome"),
)
COMPLETION_TOKENS = Metric("dflash_completion_tokens", "counter", "Tokens given to clients.")
TTFT = Metric(
    "dflash_time_to_first_token_seconds",
    "histogram",
    "From a streamed request's arrival at the replica to its first output.",
    boundaries=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
REQUEST_ACCEPTANCE_LENGTH = Metric(
    "dflash_request_acceptance_length",
    "histogram",
    "Acceptance length of each finished request.",
    boundaries=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16),
)

CATALOGUE: tuple[Metric, ...] = tuple(value for value in globals().values() if isinstance(value, Metric))
