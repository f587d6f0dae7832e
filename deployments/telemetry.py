"""Publishes the catalogue of dflash_serve.metrics through Ray's metrics agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.util import metrics as ray_metrics

from dflash_serve import metrics as catalogue
from dflash_serve.metrics import Metric

if TYPE_CHECKING:
    from dflash_serve.gateway import RequestRecord
    from dflash_serve.vllm_ext.stat_logger import EngineStats

PUBLISH_PERIOD_SECONDS = 1.0


class Telemetry:
    """The metrics of one replica."""

    def __init__(self, model_id: str, replica_id: str) -> None:
        self._tags = {"model": model_id, "replica": replica_id}
        self._metrics = {metric.name: _make(metric) for metric in catalogue.CATALOGUE}
        self._published: dict[tuple[str, ...], float] = {}
        self._task: asyncio.Task[None] | None = None

    def observe(self, record: RequestRecord) -> None:
        """Count one finished request."""
        by_class = {"traffic_class": record.traffic_class}
        self._count(catalogue.REQUESTS, 1, outcome=record.outcome, **by_class)
        for metric, amount in (
            (catalogue.PROMPT_TOKENS, record.prompt_tokens),
            (catalogue.COMPLETION_TOKENS, record.completion_tokens),
            (catalogue.REQUEST_VERIFICATIONS, record.num_drafts),
            (catalogue.REQUEST_DRAFT_TOKENS, record.draft_tokens),
            (catalogue.REQUEST_ACCEPTED_TOKENS, record.accepted_tokens),
        ):
            self._count(metric, amount or 0, **by_class)
        if record.stream and record.outcome == "ok":
            self._observe(catalogue.TTFT, record.ttft_seconds, **by_class)
        self._observe(catalogue.TPOT, record.time_per_output_token_seconds, **by_class)
        self._observe(catalogue.REQUEST_ACCEPTANCE_LENGTH, record.acceptance_length, **by_class)

    def publish(self, stats: EngineStats) -> None:
        """Set gauges and move counters to where the engine stands now."""
        self._set(catalogue.RUNNING_REQUESTS, stats.running_requests)
        self._set(catalogue.WAITING_REQUESTS, stats.waiting_requests)
        self._set(catalogue.KV_CACHE_USAGE, stats.kv_cache_usage)
        acceptance_length = stats.acceptance_length()
        if acceptance_length is not None:  # a gauge that is not set again disappears: nothing stale is shown
            self._set(catalogue.ACCEPTANCE_LENGTH, acceptance_length)
        total = stats.total
        self._move(catalogue.VERIFICATIONS, total.verifications)
        self._move(catalogue.DRAFT_TOKENS, total.draft_tokens)
        self._move(catalogue.ACCEPTED_TOKENS, total.accepted_tokens)
        for metric, counts in (
            (catalogue.POSITION_DRAFT_TOKENS, total.drafted_per_position),
            (catalogue.POSITION_ACCEPTED_TOKENS, total.accepted_per_position),
        ):
            for position, count in by_position(counts).items():
                self._move(metric, count, position=position)
        report = stats.draft_length()
        if report is not None:
            self._publish_draft_length(report)

    def _publish_draft_length(self, report: Mapping[str, Any]) -> None:
        """What `DraftLengthController.report` gave in the engine's process."""
        self._move(catalogue.EXPECTED_TOKENS, int(report["expected_tokens"]))
        self._move(catalogue.REALISED_TOKENS, report["realised_tokens"])
        self._move(catalogue.AUTOREGRESSIVE_SECONDS, report["autoregressive_seconds"])
        for draft_tokens, steps in report["steps_by_draft_tokens"].items():
            key = (catalogue.CHOSEN_DRAFT_TOKENS.name, draft_tokens)
            for _ in range(steps - int(self._published.get(key, 0))):
                self._observe(catalogue.CHOSEN_DRAFT_TOKENS, float(draft_tokens))
            self._published[key] = steps
        if not report["fresh"]:
            # an idle engine chooses nothing
            return
        self._set(catalogue.DRAFTER_UNPROFITABLE, float(report["unprofitable"]))
        for metric, value in (
            (catalogue.ESTIMATED_SPEEDUP, report["estimated_speedup"]),
            (catalogue.STEP_COST_ERROR, report["cost_error_ratio"]),
        ):
            if value is not None:
                self._set(metric, value)

    def start(self, stats: Callable[[], EngineStats], *, start_seconds: float) -> None:
        """Publish every second, from the running event loop, until it ends."""

        async def loop() -> None:
            while True:
                self.publish(stats())
                self._set(catalogue.START_SECONDS, start_seconds)
                await asyncio.sleep(PUBLISH_PERIOD_SECONDS)

        self._task = asyncio.get_running_loop().create_task(loop())

    def _move(self, metric: Metric, value: float, **labels: str) -> None:
        """Count up to `value`."""
        key = (metric.name, *labels.values())
        self._count(metric, value - self._published.get(key, 0), **labels)
        self._published[key] = value

    def _count(self, metric: Metric, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray's counters refuse zero
            self._metrics[metric.name].inc(amount, tags=self._tags | labels)

    def _set(self, metric: Metric, value: float) -> None:
        self._metrics[metric.name].set(value, tags=self._tags)

    def _observe(self, metric: Metric, value: float | None, **labels: str) -> None:
        if value is not None:
            self._metrics[metric.name].observe(value, tags=self._tags | labels)


def by_position(counts: Sequence[int]) -> dict[str, int]:
    """Label of a position -> count; as many labels as the catalogue allows, the last for all that lie beyond."""
    labelled: dict[str, int] = {}
    for index, count in enumerate(counts):
        label = catalogue.position_label(index)
        labelled[label] = labelled.get(label, 0) + count
    return labelled


def _make(metric: Metric) -> Any:
    """Ray's metric of that kind; its three kinds share no method that records."""
    if metric.kind == "counter":
        return ray_metrics.Counter(metric.name, metric.description, tag_keys=metric.labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, metric.description, tag_keys=metric.labels)
    return ray_metrics.Histogram(metric.name, metric.description, list(metric.boundaries), tag_keys=metric.labels)
