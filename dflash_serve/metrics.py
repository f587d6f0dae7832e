"""Every metric that we export or rely on: names, types, units and labels, in one place.

docs/metrics.md, the dashboards, the rules and the tests are made from it. Ray's metrics agent prefixes each name with
`ray_`, adds `_total` to counters and the labels `SessionName`, `NodeAddress`, `WorkerId`, … of its own. Labels here are
bounded by construction: a model, a replica, an outcome, a position of the draft, a traffic class from a list in the
settings; nothing that a client writes becomes one.

What Ray 2.60 does to them: values travel every 10 s; a counter appears with its first increment, never at zero; a
histogram's buckets and count are exact but its sum is made of bucket midpoints, so a mean must come from counters; a
gauge that is not set again disappears within 30 s (its agent keeps a value for two periods).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BASE_LABELS = ("model", "replica")
OTHER_CLASS = "other"
"""The traffic class of a request that names none, or one that is not in `metrics.traffic_classes`."""
MAX_TRAFFIC_CLASSES = 16
MAX_POSITIONS = 32
"""Positions of the draft that have series of their own; what lies beyond counts for the last."""


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = BASE_LABELS
    boundaries: tuple[float, ...] = ()
    origin: Literal["dflash-serve", "vLLM", "Ray Serve", "Ray"] = "dflash-serve"

    @property
    def exported_name(self) -> str:
        """As Prometheus sees it (a histogram's series add `_bucket`, `_sum`, `_count`)."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"

    @property
    def series_name(self) -> str:
        """A series that exists when the metric does."""
        return f"{self.exported_name}_count" if self.kind == "histogram" else self.exported_name

    @property
    def unit(self) -> str:
        """By the name's end; for most counts, what is counted."""
        for ending, unit in _UNITS.items():
            if self.name.endswith(ending):
                return unit
        return self.name.rsplit("_", 1)[-1]


_UNITS = {
    "acceptance_length": "tokens per verification",
    "_seconds": "seconds",
    "_ratio": "ratio",
    "_perc": "ratio",
    "_tokens": "tokens",
    "_unprofitable": "0 or 1",
    "_healthy": "0 or 1",
    "_utilization": "percent",
    "_mem_used": "bytes",
    "num_preemptions": "preemptions",
    "prefix_cache_queries": "tokens",
    "prefix_cache_hits": "tokens",
}

# Speculation, counted by the engine
ACCEPTANCE_LENGTH = Metric(
    "dflash_acceptance_length",
    "gauge",
    "Tokens per verification, bonus token included, over the window (metrics.acceptance_window_seconds); "
    "absent while nothing was verified.",
)
VERIFICATIONS = Metric("dflash_verifications", "counter", "Verifications: target passes that checked draft tokens.")
DRAFT_TOKENS = Metric("dflash_draft_tokens", "counter", "Draft tokens proposed to the target.")
ACCEPTED_TOKENS = Metric("dflash_accepted_tokens", "counter", "Draft tokens that the target accepted.")
POSITION_DRAFT_TOKENS = Metric(
    "dflash_position_draft_tokens",
    "counter",
    f"Draft tokens proposed at a position of the draft, 01 being the first; {MAX_POSITIONS} stands for all from there.",
    labels=(*BASE_LABELS, "position"),
)
POSITION_ACCEPTED_TOKENS = Metric(
    "dflash_position_accepted_tokens",
    "counter",
    "Draft tokens accepted at a position of the draft.",
    labels=(*BASE_LABELS, "position"),
)

# The draft length, chosen at each step (speculation.mode: adaptive)
CHOSEN_DRAFT_TOKENS = Metric(
    "dflash_chosen_draft_tokens",
    "histogram",
    "Draft tokens (K) of each engine step that decoded.",
    # Ray takes no boundary at zero
    boundaries=(0.5, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15),
)
EXPECTED_TOKENS = Metric("dflash_expected_tokens", "counter", "Tokens that those steps were expected to give.")
REALISED_TOKENS = Metric("dflash_realised_tokens", "counter", "Tokens that the same steps gave.")
STEP_COST_ERROR = Metric(
    "dflash_step_cost_error_ratio",
    "gauge",
    "By how much a step's time differs from the step-cost model's, as a share, a decayed mean.",
)
AUTOREGRESSIVE_SECONDS = Metric(
    "dflash_autoregressive_seconds", "counter", "Engine time in steps at K = 0 while speculation is configured."
)
ESTIMATED_SPEEDUP = Metric(
    "dflash_estimated_speedup_ratio",
    "gauge",
    "Estimated tokens/s at the chosen K over those at K = 0, at the present load and acceptance.",
)
DRAFTER_UNPROFITABLE = Metric(
    "dflash_drafter_unprofitable", "gauge", "1 while the best choice is K = 0: the drafter does not pay."
)

# Load of the engine
RUNNING_REQUESTS = Metric(
    "dflash_running_requests",
    "gauge",
    "Requests in the engine's running batch. Set every second, also at zero: a replica that has it is alive.",
)
WAITING_REQUESTS = Metric("dflash_waiting_requests", "gauge", "Requests that wait for the engine.")
KV_CACHE_USAGE = Metric("dflash_kv_cache_usage_ratio", "gauge", "Share of the KV cache in use, 0 to 1.")
START_SECONDS = Metric(
    "dflash_start_seconds", "gauge", "What this replica took from its constructor to a loaded engine."
)

# Requests, counted by the gateway when they end
CLASS_LABELS = (*BASE_LABELS, "traffic_class")
REQUESTS = Metric(
    "dflash_requests",
    "counter",
    "Requests by how they ended: ok, shed (429: the replica was full), rejected (another 4xx by us), error, "
    "disconnected.",
    labels=(*CLASS_LABELS, "outcome"),
)
PROMPT_TOKENS = Metric("dflash_prompt_tokens", "counter", "Prompt tokens of ended requests.", labels=CLASS_LABELS)
COMPLETION_TOKENS = Metric("dflash_completion_tokens", "counter", "Tokens given to clients.", labels=CLASS_LABELS)
REQUEST_VERIFICATIONS = Metric(
    "dflash_request_verifications", "counter", "Verifications of ended requests.", labels=CLASS_LABELS
)
REQUEST_DRAFT_TOKENS = Metric(
    "dflash_request_draft_tokens", "counter", "Draft tokens proposed for ended requests.", labels=CLASS_LABELS
)
REQUEST_ACCEPTED_TOKENS = Metric(
    "dflash_request_accepted_tokens", "counter", "Accepted draft tokens of ended requests.", labels=CLASS_LABELS
)
TTFT = Metric(
    "dflash_time_to_first_token_seconds",
    "histogram",
    "From a streamed request's arrival at the replica to its first output.",
    labels=CLASS_LABELS,
    boundaries=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
TPOT = Metric(
    "dflash_time_per_output_token_seconds",
    "histogram",
    "Mean time between the output tokens of a streamed request, the first apart.",
    labels=CLASS_LABELS,
    boundaries=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1),
)
REQUEST_ACCEPTANCE_LENGTH = Metric(
    "dflash_request_acceptance_length",
    "histogram",
    "Acceptance length of each finished request.",
    labels=CLASS_LABELS,
    boundaries=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16),
)

# What others export and we rely on
_VLLM_LABELS = ("model_name", "engine", "ReplicaId")
VLLM_PROMPT_TOKENS = Metric(
    "vllm_prompt_tokens", "counter", "Prompt tokens, when they are prefilled.", _VLLM_LABELS, origin="vLLM"
)
VLLM_GENERATION_TOKENS = Metric(
    "vllm_generation_tokens", "counter", "Output tokens, when they are made.", _VLLM_LABELS, origin="vLLM"
)
VLLM_QUEUE_TIME = Metric(
    "vllm_request_queue_time_seconds",
    "histogram",
    "How long a finished request waited for the engine.",
    _VLLM_LABELS,
    origin="vLLM",
)
VLLM_E2E_LATENCY = Metric(
    "vllm_e2e_request_latency_seconds",
    "histogram",
    "From a request's arrival at the engine to its last token.",
    _VLLM_LABELS,
    origin="vLLM",
)
VLLM_PREEMPTIONS = Metric(
    "vllm_num_preemptions",
    "counter",
    "Requests put back to wait because the KV cache was full.",
    _VLLM_LABELS,
    origin="vLLM",
)
VLLM_PREFIX_QUERIES = Metric(
    "vllm_prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache.", _VLLM_LABELS, origin="vLLM"
)
VLLM_PREFIX_HITS = Metric(
    "vllm_prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache.", _VLLM_LABELS, origin="vLLM"
)
SERVE_TARGET_REPLICAS = Metric(
    "serve_autoscaling_target_replicas",
    "gauge",
    "Replicas that the autoscaler wants.",
    ("application", "deployment"),
    origin="Ray Serve",
)
SERVE_REPLICA_HEALTHY = Metric(
    "serve_deployment_replica_healthy",
    "gauge",
    "1 while a replica answers its health check.",
    ("application", "deployment", "replica"),
    origin="Ray Serve",
)
NODE_CPU = Metric(
    "node_cpu_utilization", "gauge", "CPU use of a node.", ("ip", "IsHeadNode", "RayNodeType"), origin="Ray"
)
NODE_MEMORY_USED = Metric(
    "node_mem_used", "gauge", "Bytes of memory in use on a node.", ("ip", "IsHeadNode", "RayNodeType"), origin="Ray"
)

_ALL: tuple[Metric, ...] = tuple(value for value in globals().values() if isinstance(value, Metric))
CATALOGUE: tuple[Metric, ...] = tuple(metric for metric in _ALL if metric.origin == "dflash-serve")
"""What we export."""
RELIED_ON: tuple[Metric, ...] = tuple(metric for metric in _ALL if metric.origin != "dflash-serve")
"""What dashboards and rules use beside it."""


def position_label(index: int) -> str:
    """The `position` of draft token `index` (from 0): "01" for the first, so that names sort as numbers do."""
    return f"{min(index + 1, MAX_POSITIONS):02d}"
