"""Prometheus recording rules and alerts.

`RuleParameters` holds every threshold and time; monitoring/rules/*.yaml are made with its defaults and what
monitoring/settings.yaml says, a test of a minute with shorter ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from dflash_serve import metrics as m
from dflash_serve.monitoring import queries as q
from dflash_serve.monitoring.queries import Scope


@dataclass(frozen=True)
class RuleParameters:
    """Thresholds and times of the rules."""

    rate_window_seconds: int = 300
    evaluation_interval_seconds: int = 30
    acceptance_floor: float = 1.2
    """Acceptance length below which no drafter pays: tokens per verification."""
    acceptance_drop_ratio: float = 0.7
    """Share of the baseline below which acceptance has dropped."""
    acceptance_baseline_seconds: int = 86400
    acceptance_for_seconds: int = 600
    min_verifications_per_second: float = 0.2
    """Below it acceptance is chance."""
    unprofitable_for_seconds: int = 900
    autoregressive_share: float = 0.5
    autoregressive_for_seconds: int = 1800
    silent_for_seconds: int = 300
    flapping_replaced_replicas: int = 3
    flapping_window_seconds: int = 3600
    waiting_requests_per_replica: float = 8
    waiting_for_seconds: int = 300
    kv_cache_usage_ratio: float = 0.95
    kv_cache_for_seconds: int = 300
    error_ratio: float = 0.02
    error_for_seconds: int = 300
    shed_ratio: float = 0.05
    shed_for_seconds: int = 300
    scaling_for_seconds: int = 900
    start_seconds: int = 600
    """A replica that took longer from constructor to loaded engine started slowly."""
    start_alert_seconds: int = 3600
    """How long that is worth an alert."""
    runbooks: str = "docs/alerts.md"
    """Path or URL of the runbooks; an alert's name in lower case is its anchor there."""


SETTINGS = Path(__file__).parents[2] / "monitoring" / "settings.yaml"


def read_parameters(path: Path = SETTINGS) -> RuleParameters:
    """The defaults with what the file says. Raises ValueError for a name that is no parameter."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    known = [field.name for field in fields(RuleParameters)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{path}: no parameter {', '.join(unknown)}; there are {', '.join(known)}")
    return RuleParameters(**values)


@dataclass(frozen=True)
class Alert:
    """An alert and its runbook."""

    name: str
    severity: Literal["critical", "warning", "info"]
    expression: str
    for_seconds: int
    summary: str
    description: str
    """With Prometheus' templates."""
    meaning: str
    check: tuple[str, ...]
    mend: tuple[str, ...]

    def rule(self, runbooks: str) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": duration(self.for_seconds),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbooks}#{self.name.lower()}",
            },
        }


ACCEPTANCE = "model:dflash_acceptance_length:rate"
VERIFICATIONS = "model:dflash_verifications:rate"
REPLICAS = "model:dflash_replicas:count"


def recordings(parameters: RuleParameters) -> list[dict[str, str]]:
    """Recording rules: the series that alerts and long-range views start from."""
    model = Scope(duration(parameters.rate_window_seconds))
    replica = model.per("replica")
    expressions = {
        ACCEPTANCE: q.acceptance_length(model),
        "model_replica:dflash_acceptance_length:rate": q.acceptance_length(replica),
        "model_position:dflash_acceptance_ratio:rate": q.position_acceptance_ratio(model),
        "model:dflash_draft_acceptance_ratio:rate": q.draft_acceptance_ratio(model),
        "model:dflash_rejected_tokens:rate": q.rejected_tokens(model),
        VERIFICATIONS: q.rate(m.VERIFICATIONS, model),
        "model:dflash_output_tokens:rate": q.output_tokens(model),
        "model:dflash_prompt_tokens:rate": q.prompt_tokens(model),
        "model:dflash_error_ratio:rate": q.outcome_ratio("error", model),
        "model:dflash_shed_ratio:rate": q.outcome_ratio("shed", model),
        "model:dflash_time_to_first_token_seconds:p95": q.quantile(0.95, m.TTFT, model),
        "model:dflash_time_per_output_token_seconds:p95": q.quantile(0.95, m.TPOT, model),
        REPLICAS: q.running_replicas(model),
        "model:dflash_waiting_requests:mean": q.now(m.WAITING_REQUESTS, model, "avg"),
    }
    return [{"record": name, "expr": expression} for name, expression in expressions.items()]


def alerts(parameters: RuleParameters) -> list[Alert]:
    """Every alert, the urgent first."""
    p = parameters
    model = Scope(duration(p.rate_window_seconds))
    busy = f"{VERIFICATIONS} > {p.min_verifications_per_second}"
    baseline = f"avg_over_time({ACCEPTANCE}[{duration(p.acceptance_baseline_seconds)}])"
    seen = m.RUNNING_REQUESTS.exported_name
    window = duration(p.flapping_window_seconds)
    start = f"max by (model, replica) ({m.START_SECONDS.exported_name}"
    wanted = m.SERVE_TARGET_REPLICAS.exported_name
    return [
        Alert(
            "DFlashNoMetrics",
            "critical",
            f"absent({wanted}{{{q.SERVER_DEPLOYMENTS}}}) or "
            f"(sum({wanted}{{{q.SERVER_DEPLOYMENTS}}}) > 0 unless on () count({seen}))",
            p.silent_for_seconds,
            "Nothing is known of the fleet.",
            "No replica has published metrics, or Ray Serve itself publishes none. The other alerts are blind.",
            "Either nothing serves, or nothing is scraped. Both look alike from here.",
            (
                "Prometheus' targets: are Ray's metrics ports (KubeRay: 8080) up?",
                "`serve status`: is the application RUNNING, are replicas HEALTHY?",
                "A request to `/v1/models`: does it answer?",
            ),
            (
                "Targets down: mend discovery (`prom_metrics_service_discovery.json`, the PodMonitor) or the network "
                "policy.",
                "Serve down: the controller's log; redeploy with `serve deploy`.",
                "Replicas up and silent: the replica's log for errors of `telemetry`; restart it.",
            ),
        ),
        Alert(
            "DFlashErrorRate",
            "critical",
            f"model:dflash_error_ratio:rate > {p.error_ratio}",
            p.error_for_seconds,
            "Requests to {{ $labels.model }} fail.",
            "{{ $value | humanizePercentage }} of the requests to {{ $labels.model }} ended with a 5xx or a broken "
            "stream.",
            "The server's fault: 5xx answers and streams that broke off. Refusals (4xx) and clients that left do not "
            "count.",
            (
                'The access log of the replicas: `"outcome": "error"`, by replica and by route.',
                "The lines with the same request id above it: the engine's own words.",
                "Replica drill-down: is it one replica or all?",
            ),
            (
                "One replica: kill it; the controller starts another.",
                "All, after a change: roll back.",
                "Engine out of memory: lower `engine.gpu_memory_utilization` or `max_num_seqs`.",
            ),
        ),
        Alert(
            "DFlashScalingStuck",
            "critical",
            f"{q.wanted_replicas()} > ({q.healthy_replicas()} or 0 * {q.wanted_replicas()})",
            p.scaling_for_seconds,
            "{{ $labels.deployment }} does not get the replicas that it wants.",
            "{{ $labels.deployment }} has wanted {{ $value }} replicas for long; fewer are healthy.",
            "The autoscaler asks for replicas that do not come up, or lost ones that do not come back.",
            (
                "`ray status`: pending demands that no node fits?",
                "`serve status`: the deployment's message.",
                "Logs of the newest replica: does its engine fail to start?",
            ),
            (
                "No capacity: add nodes or quota, or lower `autoscaling.max_replicas`.",
                "Engine fails to start: its message names the cause; roll back or mend the settings.",
            ),
        ),
        Alert(
            "DFlashReplicaFlapping",
            "critical",
            f"count by (model) (count by (model, replica) (present_over_time({seen}[{window}]))) "
            f"- max_over_time({REPLICAS}[{window}]) >= {p.flapping_replaced_replicas}",
            0,
            "Replicas of {{ $labels.model }} come and go.",
            "{{ $value }} replicas of {{ $labels.model }} were replaced within " + window + ".",
            "More replicas lived in the window than ever did at once: they die and are replaced, or scaling swings.",
            (
                "`serve status` and the controller's log: why did they stop (health check, crash, scale down)?",
                "The last lines of a dead replica's log: out of memory, a CUDA error?",
                "Replicas wanted over the same time: does the autoscaler swing?",
            ),
            (
                "Crashes: mend the cause; roll back after a change.",
                "Health checks that time out under load: fewer requests at once (`limits.max_concurrent_requests`).",
                "A swinging autoscaler: raise `autoscaling.downscale_delay_s`.",
            ),
        ),
        Alert(
            "DFlashAcceptanceCollapsed",
            "warning",
            f"{ACCEPTANCE} < {p.acceptance_floor} and {busy}",
            p.acceptance_for_seconds,
            "The drafter of {{ $labels.model }} hardly guesses a token.",
            "{{ $labels.model }} makes {{ $value | humanize }} tokens per verification, the bonus token included: "
            "drafting costs more than it gives.",
            "An acceptance length of 1 means that every draft token is rejected. Outputs stay right; throughput falls "
            "below what the target alone would give.",
            (
                "Speculation dashboard, by position: position 01 near zero means that the drafter does not fit the "
                "target; a steep fall after it means hard or random text.",
                "By traffic class: is it one kind of traffic (high temperature, another language)?",
                "By replica: a single replica points to its weights, all point to a change of model.",
                "The start of the replica's log: which target and drafter revisions were loaded?",
            ),
            (
                "A new target or drafter revision: pin the pair that was trained together (`target_revision`, "
                "`drafter_revision`).",
                "One kind of traffic: train the drafter on it (dflash_serve/training), or serve it apart.",
                "Until then `speculation.mode: off` gives the target's own speed.",
            ),
        ),
        Alert(
            "DFlashAcceptanceDropped",
            "warning",
            f"{ACCEPTANCE} < {p.acceptance_drop_ratio} * {baseline} and {busy}",
            p.acceptance_for_seconds,
            "Acceptance of {{ $labels.model }} is far below its usual level.",
            "{{ $labels.model }} makes {{ $value | humanize }} tokens per verification, less than "
            f"{p.acceptance_drop_ratio:.0%} of its mean over {duration(p.acceptance_baseline_seconds)}.",
            "Still above the floor, and much worse than it was.",
            (
                "When did it begin: with a deployment, or with a change of traffic?",
                "By traffic class and by position, as for DFlashAcceptanceCollapsed.",
            ),
            (
                "A deployment: roll back, compare revisions.",
                "Traffic: nothing is broken; consider drafting fewer tokens (`speculation.max_draft_tokens`) or "
                "training the drafter on the new traffic.",
            ),
        ),
        Alert(
            "DFlashDrafterUnprofitable",
            "warning",
            f"{q.now(m.DRAFTER_UNPROFITABLE, Scope('5m'), 'avg')} > 0.5",
            p.unprofitable_for_seconds,
            "The drafter of {{ $labels.model }} does not pay.",
            "On {{ $value | humanizePercentage }} of the replicas of {{ $labels.model }} the best choice is not to "
            "draft, at the acceptance and the load that they have.",
            "By the measured step costs, verifying draft tokens takes longer than the accepted ones save.",
            (
                "Acceptance length: has it fallen? Then DFlashAcceptanceCollapsed's runbook.",
                "Running requests: large batches make verification dear; a full fleet may rightly stop drafting.",
                "Step-cost error: above 0.3 the estimate itself is doubtful; calibrate anew.",
            ),
            (
                "Acceptance fine and load high: add replicas, if the speed matters more than the cost.",
                "Always so: take the drafter out (`speculation.mode: off`) and use its memory for the KV cache.",
            ),
        ),
        Alert(
            "DFlashSpeculationOff",
            "warning",
            f"{q.autoregressive_share(model)} > {p.autoregressive_share}",
            p.autoregressive_for_seconds,
            "{{ $labels.model }} has hardly drafted for long.",
            "The engines of {{ $labels.model }} spend {{ $value | humanizePercentage }} of the time in steps without "
            "draft tokens, with speculation configured.",
            "The choice of K stays at 0. Right at a peak; for long it means that the drafter is loaded for nothing.",
            (
                "Estimated speed-up and chosen K on the speculation dashboard: since when?",
                "Load: does it stay above what drafting pays at?",
            ),
            (
                "Load: add replicas, or accept it.",
                "Step costs out of date (new hardware, new vLLM): calibrate anew.",
            ),
        ),
        Alert(
            "DFlashReplicaSilent",
            "warning",
            f"sum({q.healthy_replicas()}) > sum({REPLICAS})",
            p.silent_for_seconds,
            "A healthy replica publishes nothing.",
            "{{ $value }} replicas are healthy by Ray Serve, and fewer publish metrics.",
            "Figures of the fleet are too low, and alerts do not see that replica.",
            (
                "Prometheus' targets: is the replica's node missing or down?",
                "The replica's log: errors of the metrics exporter?",
            ),
            ("Mend the target; else restart the replica.",),
        ),
        Alert(
            "DFlashQueueGrowing",
            "warning",
            f"model:dflash_waiting_requests:mean > {p.waiting_requests_per_replica}",
            p.waiting_for_seconds,
            "Requests to {{ $labels.model }} wait.",
            "{{ $value | humanize }} requests wait in each engine of {{ $labels.model }}; first tokens come late.",
            "More comes in than the replicas finish.",
            (
                "Replicas wanted and running: is scaling on its way, at its maximum, or stuck?",
                "KV cache: full (DFlashKvCacheFull) means that memory, not compute, is the limit.",
                "Running requests: uneven over replicas? Then routing.",
            ),
            (
                "Raise `autoscaling.max_replicas` or lower `target_ongoing_requests`.",
                "Lower `limits.max_concurrent_requests`: refusing early is kinder than a long wait.",
            ),
        ),
        Alert(
            "DFlashKvCacheFull",
            "warning",
            f"max by (model, replica) ({m.KV_CACHE_USAGE.exported_name}) > {p.kv_cache_usage_ratio}",
            p.kv_cache_for_seconds,
            "The KV cache of replica {{ $labels.replica }} is full.",
            "{{ $value | humanizePercentage }} of the KV cache of {{ $labels.model }} on {{ $labels.replica }} is in "
            "use; running requests are put back to wait.",
            "Long contexts or many requests fill the memory; preempted requests are computed twice.",
            (
                "Preemptions on the replica drill-down.",
                "Prompt tokens: has traffic with long prompts begun?",
            ),
            (
                "Fewer requests at once: `limits.max_concurrent_requests`, `engine.max_num_seqs`.",
                "More cache: `engine.gpu_memory_utilization`, an fp8 KV cache, shorter `max_model_len`.",
                "More replicas.",
            ),
        ),
        Alert(
            "DFlashRequestsShed",
            "warning",
            f"model:dflash_shed_ratio:rate > {p.shed_ratio}",
            p.shed_for_seconds,
            "{{ $labels.model }} refuses requests.",
            "{{ $value | humanizePercentage }} of the requests to {{ $labels.model }} got 429: the replicas are full.",
            "Each replica takes `limits.max_concurrent_requests`; clients are told to come back.",
            (
                "Replicas wanted and running: at `max_replicas`?",
                "Running requests by replica: all full, or one? One means uneven routing.",
            ),
            (
                "Raise `autoscaling.max_replicas`, or `limits.max_concurrent_requests` where the KV cache has room.",
                "Clients that do not back off: have them honour Retry-After.",
            ),
        ),
        Alert(
            "DFlashSlowColdStart",
            "warning",
            f"{start}) > {p.start_seconds} unless {start} offset {duration(p.start_alert_seconds)})",
            0,
            "Replica {{ $labels.replica }} started slowly.",
            "{{ $labels.model }} took {{ $value | humanizeDuration }} to load on {{ $labels.replica }}; scaling up "
            "is that late.",
            "From the replica's constructor to a loaded engine: weights, compilation, graphs. The node's own start and "
            "the image come on top.",
            (
                "The replica's log: which step took the time (download, load, compile, capture)?",
                "Are the weights on the node, or fetched each time?",
            ),
            (
                "Weights on a local disk or a warm cache; a cache of compiled code on a volume.",
                "Until then more `autoscaling.min_replicas`, so that a peak does not wait for a start.",
            ),
        ),
    ]


def groups(parameters: RuleParameters) -> dict[str, dict[str, Any]]:
    """File name -> content."""
    interval = duration(parameters.evaluation_interval_seconds)
    alert_rules = [alert.rule(parameters.runbooks) for alert in alerts(parameters)]
    return {
        "recording.yaml": {
            "groups": [{"name": "dflash-recording", "interval": interval, "rules": recordings(parameters)}]
        },
        "alerts.yaml": {"groups": [{"name": "dflash-alerts", "interval": interval, "rules": alert_rules}]},
    }


def render(content: dict[str, Any]) -> str:
    """As YAML."""
    note = "# Made by `python -m dflash_serve.monitoring`; change dflash_serve/monitoring/rules.py instead.\n"
    return note + yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)


def duration(seconds: int) -> str:
    """As Prometheus writes it: 90 -> "90s", 300 -> "5m", 86400 -> "1d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
