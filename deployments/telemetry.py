"""Publishes the catalogue of dflash_serve.metrics through Ray's metrics agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
        self._published = dict.fromkeys((catalogue.VERIFICATIONS, catalogue.DRAFT_TOKENS, catalogue.ACCEPTED_TOKENS), 0)
        self._task: asyncio.Task[None] | None = None

    def observe(self, record: RequestRecord) -> None:
        """Count one finished request."""
        self._count(catalogue.REQUESTS, 1, outcome=record.outcome)
        if record.completion_tokens:
            self._count(catalogue.COMPLETION_TOKENS, record.completion_tokens)
        if record.stream and record.outcome == "ok" and record.ttft_seconds is not None:
            self._metrics[catalogue.TTFT.name].observe(record.ttft_seconds, tags=self._tags)
        if record.acceptance_length is not None:
            self._metrics[catalogue.REQUEST_ACCEPTANCE_LENGTH.name].observe(record.acceptance_length, tags=self._tags)

    def publish(self, stats: EngineStats) -> None:
        """Set gauges and move counters to where the engine stands now."""
        self._set(catalogue.RUNNING_REQUESTS, stats.running_requests)
        self._set(catalogue.WAITING_REQUESTS, stats.waiting_requests)
        self._set(catalogue.KV_CACHE_USAGE, stats.kv_cache_usage)
        acceptance_length = stats.acceptance_length()
        if acceptance_length is not None:
            self._set(catalogue.ACCEPTANCE_LENGTH, acceptance_length)
        for metric, value in (
            (catalogue.VERIFICATIONS, stats.total.verifications),
            (catalogue.DRAFT_TOKENS, stats.total.draft_tokens),
            (catalogue.ACCEPTED_TOKENS, stats.total.accepted_tokens),
        ):
            self._count(metric, value - self._published[metric])
            self._published[metric] = value

    def start(self, stats: Callable[[], EngineStats]) -> None:
        """Publish every second, from the running event loop, until it ends."""

        async def loop() -> None:
            while True:
                self.publish(stats())
                await asyncio.sleep(PUBLISH_PERIOD_SECONDS)

        self._task = asyncio.get_running_loop().create_task(loop())

    def _count(self, metric: Metric, amount: int, **labels: str) -> None:
        if amount > 0:  # Ray's counters refuse zero
            self._metrics[metric.name].inc(amount, tags=self._tags | labels)

    def _set(self, metric: Metric, value: float) -> None:
        self._metrics[metric.name].set(value, tags=self._tags)


def _make(metric: Metric) -> Any:
    """Ray's metric of that kind; its three kinds share no method that records."""
    if metric.kind == "counter":
        return ray_metrics.Counter(metric.name, metric.description, tag_keys=metric.labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, metric.description, tag_keys=metric.labels)
    return ray_metrics.Histogram(metric.name, metric.description, list(metric.boundaries), tag_keys=metric.labels)
