"""`dflash-serve top`: the fleet in a terminal, live, from the same queries as the dashboards."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dflash_serve import metrics as m
from dflash_serve.monitoring import queries as q
from dflash_serve.monitoring.prometheus import (
    DISCOVERY,
    Prometheus,
    PrometheusError,
    running,
)
from dflash_serve.monitoring.queries import Scope

WINDOW = "1m"
"""Over which rates are taken: Ray's metrics move every 10 s."""
BAR_WIDTH = 24


@dataclass(frozen=True)
class Row:
    """One replica; None where Prometheus knows nothing."""

    replica: str
    running: float | None
    waiting: float | None
    kv_cache_usage: float | None
    output_tokens_per_second: float | None
    acceptance_length: float | None
    draft_tokens: float | None
    """K, as it came out on average."""
    ttft_seconds: float | None
    """95th percentile."""
    tpot_seconds: float | None
    """Median."""


@dataclass(frozen=True)
class ModelView:
    """What is known of one model."""

    model: str
    requests_per_second: float | None
    error_ratio: float | None
    shed_ratio: float | None
    estimated_speedup: float | None
    rows: tuple[Row, ...]
    acceptance_by_position: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What one screen shows."""

    models: tuple[ModelView, ...]
    wanted_replicas: float | None
    alerts: tuple[str, ...]


def ask(prometheus: Prometheus) -> View:
    """Ask for everything once. Raises PrometheusError."""
    model = Scope(WINDOW)
    replica = model.per("replica")

    def values(expression: str, *labels: str) -> dict[tuple[str, ...], float]:
        samples = prometheus.query(expression)
        return {
            tuple(sample.labels.get(label, "") for label in labels): sample.value
            for sample in samples
            if not math.isnan(sample.value)
        }

    def by_replica(expression: str) -> dict[tuple[str, ...], float]:
        return values(expression, "model", "replica")

    def by_model(expression: str) -> dict[tuple[str, ...], float]:
        return values(expression, "model")

    alive = by_replica(q.now(m.RUNNING_REQUESTS, replica))
    waiting = by_replica(q.now(m.WAITING_REQUESTS, replica))
    kv_cache_usage = by_replica(q.now(m.KV_CACHE_USAGE, replica, "max"))
    output = by_replica(q.output_tokens(replica))
    acceptance = by_replica(q.acceptance_length(replica))
    draft_tokens = by_replica(q.draft_tokens_per_verification(replica))
    ttft = by_replica(q.quantile(0.95, m.TTFT, replica))
    tpot = by_replica(q.quantile(0.5, m.TPOT, replica))
    requests = by_model(q.rate(m.REQUESTS, model))
    errors = by_model(q.outcome_ratio("error", model))
    shed = by_model(q.outcome_ratio("shed", model))
    speedup = by_model(q.estimated_speedup(model))
    positions = values(q.position_acceptance_ratio(model), "model", "position")
    wanted = values(q.wanted_replicas(), "deployment")
    alerts = sorted({alert["labels"]["alertname"] for alert in prometheus.alerts() if alert["state"] == "firing"})
    rows: dict[str, list[Row]] = {}
    for key in sorted(alive):
        of, name = key
        rows.setdefault(of, []).append(
            Row(
                replica=name,
                running=alive[key],
                waiting=waiting.get(key),
                kv_cache_usage=kv_cache_usage.get(key),
                output_tokens_per_second=output.get(key),
                acceptance_length=acceptance.get(key),
                draft_tokens=draft_tokens.get(key),
                ttft_seconds=ttft.get(key),
                tpot_seconds=tpot.get(key),
            )
        )
    models = tuple(
        ModelView(
            model=name,
            requests_per_second=requests.get((name,)),
            error_ratio=errors.get((name,)),
            shed_ratio=shed.get((name,)),
            estimated_speedup=speedup.get((name,)),
            rows=tuple(replicas),
            acceptance_by_position={p: share for (of, p), share in sorted(positions.items()) if of == name},
        )
        for name, replicas in rows.items()
    )
    return View(models, sum(wanted.values()) if wanted else None, tuple(alerts))


def render(view: View) -> RenderableType:
    """The screen."""
    if not view.models:
        return Text("waiting for metrics: Ray publishes them every 10 s", style="dim")
    alive = sum(len(model.rows) for model in view.models)
    head = Text.assemble(
        ("replicas ", "dim"),
        (f"{alive}", "bold"),
        (" of ", "dim"),
        (_number(view.wanted_replicas, "{:.0f}"), "bold"),
        (" wanted    alerts ", "dim"),
        (", ".join(view.alerts) or "none", "bold red" if view.alerts else "bold green"),
    )
    return Group(head, *map(_model, view.models))


def _model(view: ModelView) -> RenderableType:
    figures = Text.assemble(
        ("requests/s ", "dim"),
        _number(view.requests_per_second, "{:.2f}"),
        ("   errors ", "dim"),
        _number(view.error_ratio, "{:.1%}"),
        ("   shed ", "dim"),
        _number(view.shed_ratio, "{:.1%}"),
        ("   estimated speed-up ", "dim"),
        _number(view.estimated_speedup, "{:.2f}x"),
    )
    parts: list[RenderableType] = [figures, _replicas(view.rows)]
    if view.acceptance_by_position:
        parts.append(_positions(view.acceptance_by_position))
    return Panel(Group(*parts), title=view.model, title_align="left")


def _replicas(rows: tuple[Row, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("replica")
    for title in ("run", "wait", "KV", "tok/s", "acceptance", "K", "TTFT p95", "TPOT p50"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.replica,
            _number(row.running, "{:.0f}"),
            _number(row.waiting, "{:.0f}"),
            _number(row.kv_cache_usage, "{:.0%}"),
            _number(row.output_tokens_per_second, "{:.1f}"),
            _number(row.acceptance_length, "{:.2f}"),
            _number(row.draft_tokens, "{:.1f}"),
            _number(row.ttft_seconds, "{:.2f} s"),
            _number(row.tpot_seconds, "{:.3f} s"),
        )
    return table


def _positions(shares: dict[str, float]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("position", justify="right")
    table.add_column("accepted", width=BAR_WIDTH)
    table.add_column("", justify="right")
    for position, share in shares.items():
        filled = round(share * BAR_WIDTH)
        bar = Text("█" * filled, style="cyan") + Text("░" * (BAR_WIDTH - filled), style="dim")
        table.add_row(position, bar, f"{share:.0%}")
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def run(console: Console, *, url: str | None, session: Path, once: bool, refresh_seconds: float) -> int:
    """Show the fleet until interrupted, or once. Returns the exit status: 1 when there is nobody to ask.

    Args:
        url: A Prometheus that scrapes the fleet; None starts one for this machine's Ray session.
    """
    try:
        with _source(url, session) as prometheus:
            if once:
                console.print(render(_first_view(prometheus) if url is None else ask(prometheus)))
                return 0
            with Live(render(ask(prometheus)), console=console, auto_refresh=False, screen=True) as live:
                while True:
                    time.sleep(refresh_seconds)
                    live.update(render(ask(prometheus)), refresh=True)
    except KeyboardInterrupt:
        return 0
    except PrometheusError as error:
        console.print(f"[red]dflash-serve top:[/red] {error}")
        return 1


FIRST_VIEW_SECONDS = 60


def _first_view(prometheus: Prometheus) -> View:
    """Of a Prometheus that has just started: waits for the rates, which need two exports of Ray's."""
    deadline = time.monotonic() + FIRST_VIEW_SECONDS
    view = ask(prometheus)
    while not any(model.requests_per_second is not None for model in view.models) and time.monotonic() < deadline:
        time.sleep(1)
        view = ask(prometheus)
    return view


@contextmanager
def _source(url: str | None, session: Path) -> Iterator[Prometheus]:
    if url is not None:
        yield Prometheus(url.rstrip("/"))
        return
    discovery = session / DISCOVERY
    if not discovery.exists():
        raise PrometheusError(
            f"no Ray session here ({discovery} is missing): start one with `make serve`, or name a Prometheus that "
            "scrapes the fleet with --prometheus"
        )
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), [discovery], scrape_seconds=5) as prometheus:
        yield prometheus
