"""docs/metrics.md from the catalogue and docs/alerts.md from the alerts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dflash_serve.metrics import CATALOGUE, MAX_POSITIONS, MAX_TRAFFIC_CLASSES, RELIED_ON, Metric
from dflash_serve.monitoring.rules import RuleParameters, alerts, duration

_METRICS_HEAD = f"""\
# Metrics

<!-- Made by `python -m dflash_serve.monitoring`; a test compares. -->

Ray's metrics agent exports them on each node (KubeRay: port 8080); a session lists its nodes in
`prom_metrics_service_discovery.json`. `make monitor` runs a Prometheus on this machine that scrapes them, with the
[alerts](alerts.md); `dflash-serve top` shows the figures in a terminal; `monitoring/` holds rules and dashboards for
Prometheus and Grafana.

Ray adds labels of its own (`NodeAddress`, `SessionName`, `WorkerId`, …). Ours are bounded: `position` has at most
{MAX_POSITIONS} values, `outcome` five, `traffic_class` those of `metrics.traffic_classes` (at most
{MAX_TRAFFIC_CLASSES}) and `other`. No label and no value holds a prompt, an answer, a key or a user's name.

## Each request

The replica's log has one JSON object a request (logger `dflash_serve.access`; where Serve's `logging_config.encoding`
is JSON, it is the `message`): model, request id, method, route, status, outcome, traffic class, trace id, tokens,
verifications, draft and accepted tokens, acceptance length, `ttft_seconds`, `tpot_seconds`, `duration_seconds`. With
`metrics.otlp_traces_endpoint` the engine sends a span for each request, part of the caller's trace where the request
brings `traceparent`; its `gen_ai.request.id` ends in the request id.

## What Ray does to metrics

What Ray 2.60 does to every metric, and what to do about it:

- Values travel every 10 s: scrape as often, and take rates over a minute or more.
- A replica ends with its engine, and what it counted since the last such time goes with it: of the requests that an
  engine's death ended with an error, `ray_dflash_requests_total` sees few. DFlashReplicaFlapping tells of such deaths.
- A counter appears with its first increment, never at zero: write `(part or 0 * whole) / (whole > 0)`.
- A histogram's `_bucket` and `_count` are exact; its `_sum` is made of the buckets' midpoints. Take quantiles from the
  buckets and means from counters.
- A gauge that is no longer set disappears within 30 s: the acceptance gauge of an idle replica, and every gauge of a
  replica that has gone. Nothing stale is shown.

What all of it costs was measured once: [observation-cost-cpu.md](../benchmarks/results/observation-cost-cpu.md).
"""

_DASHBOARDS = """\
## Dashboards

`monitoring/dashboards/*.json`, for Grafana 11 or later: import them, mount them, or let `make monitor` provision them.
The pictures are their panels drawn from the series of a load test on two CPU cores
(`python -m benchmarks.dashboard_preview`): the load climbs until one replica is full, and a second one starts.

| | |
|---|---|
| Fleet | ![Fleet](dashboards/fleet.png) |
| Speculation | ![Speculation](dashboards/speculation.png) |
| Replica | ![Replica](dashboards/replica.png) |
"""

_ALERTS_HEAD = """\
# Alerts

<!-- Made by `python -m dflash_serve.monitoring`; a test compares. -->

The rules are `monitoring/rules/alerts.yaml`; they start from `monitoring/rules/recording.yaml`, so load both. Each
alert has its runbook here. Thresholds and times are `RuleParameters` in `dflash_serve/monitoring/rules.py`, and
`monitoring/settings.yaml` is laid over them; there, set where this page is found, and alerts will link to it.
"""


def render_metrics() -> str:
    parts = [_METRICS_HEAD, "## Exported by dflash-serve\n", _table(CATALOGUE)]
    for origin in dict.fromkeys(metric.origin for metric in RELIED_ON):
        parts += [f"## Relied on: {origin}\n", _table([metric for metric in RELIED_ON if metric.origin == origin])]
    parts.append(_DASHBOARDS)
    return "\n".join(parts)


def render_alerts(parameters: RuleParameters) -> str:
    rows = ["| alert | severity | after | |", "|---|---|---|---|"]
    sections = []
    for alert in alerts(parameters):
        after = duration(alert.for_seconds) if alert.for_seconds else "at once"
        plain = re.sub(r"(?:[Rr]eplica )?\{\{ \$labels\.(\w+) \}\}", r"a \1", alert.summary)
        plain = plain[0].upper() + plain[1:]
        rows.append(f"| [{alert.name}](#{alert.name.lower()}) | {alert.severity} | {after} | {plain} |")
        sections.append(
            "\n".join(
                (
                    f"## {alert.name}\n",
                    f"{alert.meaning}\n",
                    f"```promql\n{alert.expression}\n```\n",
                    "Look at:\n",
                    *(f"- {step}" for step in alert.check),
                    "\nMend:\n",
                    *(f"- {step}" for step in alert.mend),
                    "",
                )
            )
        )
    return "\n".join((_ALERTS_HEAD, *rows, "", *sections))


def _table(metrics: Sequence[Metric]) -> str:
    rows = ["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.exported_name}` | {metric.kind} | {metric.unit} | {labels} | {metric.description} |")
    return "\n".join(rows) + "\n"
