"""Samples -> the rows of a table. Pure.

A round measures every side once, so a ratio or a difference of two sides is taken within each round: what drifts
between rounds falls on both. A figure over rounds is their median, its spread the smallest and the largest. Percentiles
of times are of all rounds together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dflash_serve.bench.samples import LatencyHistogram, Sample
from dflash_serve.speculation.acceptance import AcceptanceCounts

AUTOREGRESSIVE = "AR"
ALL = "all"


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found)) if found else None


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles | None:
        found = sorted(values)
        return cls(percentile(found, 50), percentile(found, 90), percentile(found, 99)) if found else None

    @classmethod
    def of_histogram(cls, histogram: LatencyHistogram) -> Percentiles | None:
        values = [histogram.percentile(percent) for percent in (50, 90, 99)]
        return cls(*[value for value in values if value is not None]) if histogram.count else None


@dataclass(frozen=True)
class Row:
    """One side of one task at one concurrency. Times in milliseconds; `speedup` over `baseline`, and what is added to
    its medians, are None for itself."""

    concurrency: int
    task: str
    side: str
    tokens_per_second: Spread
    speedup: Spread | None
    acceptance_length: float | None
    acceptance_source: str | None
    acceptance_by_position: tuple[float, ...]
    """Share of verifications that accepted draft token 1, 2, …"""
    drafted: float | None
    """Draft tokens of a verification, on average: K where it is fixed."""
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    gap_ms: Percentiles | None
    """Inter-token latency: between events of a stream."""
    added_ttft_ms: Spread | None
    added_gap_ms: Spread | None
    requests: int
    failed: int
    prompt_tokens: float
    """Of a request, on average; 0 from an API without usage."""
    completion_tokens: int
    client_cpu_share: float
    server_cpu_ms_per_token: float | None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, with linear interpolation between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarise(samples: Sequence[Sample], baseline: str = AUTOREGRESSIVE) -> list[Row]:
    """One row a (concurrency, task, side), sides in the order of the samples; `all` sums the tasks that every side has
    in the round.

    A cell in which every request failed has a row too, with 0 tokens/s.
    """
    sides = list(dict.fromkeys(s.side for s in samples))
    tasks = list(dict.fromkeys(s.task for s in samples))
    rows = []
    for concurrency in sorted({s.concurrency for s in samples}):
        cells = [s for s in samples if s.concurrency == concurrency]
        found = {s.side for s in cells}
        measured = {(s.task, s.round, s.side) for s in cells}
        common = {(t, n) for t, n, _ in measured if all((t, n, side) in measured for side in found)}
        for task in [*tasks, ALL] if len({t for t, _ in common}) > 1 else tasks:
            mine = [s for s in cells if s.task == task or (task == ALL and (s.task, s.round) in common)]
            base = [s for s in mine if s.side == baseline]
            for side in sides:
                chosen = [s for s in mine if s.side == side]
                if chosen:
                    rows.append(_row(concurrency, task, side, chosen, base if side != baseline else []))
    return rows


def _row(concurrency: int, task: str, side: str, samples: list[Sample], base: list[Sample]) -> Row:
    own_speeds, base_speeds = _by_round(samples, _tokens_per_second), _by_round(base, _tokens_per_second)
    counts, gaps = AcceptanceCounts(), LatencyHistogram()
    for sample in samples:
        gaps.merge(sample.gaps)
        if (one := sample.acceptance) is not None:
            counts.add(one.verifications, one.draft_tokens, one.accepted_tokens, one.accepted_per_position)
    good = [request for sample in samples for request in sample.good]
    tokens = sum(request.completion_tokens for request in good)
    server = [s.server_cpu_seconds for s in samples if s.server_cpu_seconds is not None]
    speed = Spread.of(own_speeds.values())
    assert speed is not None
    return Row(
        concurrency=concurrency,
        task=task,
        side=side,
        tokens_per_second=speed,
        speedup=Spread.of(own_speeds[n] / base_speeds[n] for n in own_speeds if base_speeds.get(n)),
        acceptance_length=counts.acceptance_length,
        acceptance_source=next((s.acceptance_source for s in samples if s.acceptance_source), None),
        acceptance_by_position=tuple(n / counts.verifications for n in counts.accepted_per_position),
        drafted=counts.draft_tokens / counts.verifications if counts.draft_tokens else None,
        ttft_ms=Percentiles.of(1000 * r.ttft_seconds for r in good if r.ttft_seconds is not None),
        tpot_ms=Percentiles.of(1000 * r.tpot_seconds for r in good if r.tpot_seconds is not None),
        gap_ms=_milliseconds(Percentiles.of_histogram(gaps)),
        added_ttft_ms=_added(_by_round(samples, _median_ttft_ms), _by_round(base, _median_ttft_ms)),
        added_gap_ms=_added(_by_round(samples, _median_gap_ms), _by_round(base, _median_gap_ms)),
        requests=sum(len(s.requests) for s in samples),
        failed=sum(len(s.requests) for s in samples) - len(good),
        prompt_tokens=statistics.mean(request.prompt_tokens for request in good) if good else 0.0,
        completion_tokens=tokens,
        client_cpu_share=max(s.client_cpu_share for s in samples),
        server_cpu_ms_per_token=1000 * sum(server) / tokens if server and tokens else None,
    )


def _by_round(samples: list[Sample], figure: Callable[[list[Sample]], float | None]) -> dict[int, float]:
    """Round -> its figure, tasks together; rounds without one are left out."""
    figures = {n: figure([s for s in samples if s.round == n]) for n in sorted({s.round for s in samples})}
    return {number: value for number, value in figures.items() if value is not None}


def _tokens_per_second(samples: list[Sample]) -> float:
    return sum(s.completion_tokens for s in samples) / sum(s.seconds for s in samples)


def _median_ttft_ms(samples: list[Sample]) -> float | None:
    good = [request for sample in samples for request in sample.good]
    times = Percentiles.of(1000 * r.ttft_seconds for r in good if r.ttft_seconds is not None)
    return times.p50 if times else None


def _median_gap_ms(samples: list[Sample]) -> float | None:
    gaps = LatencyHistogram()
    for sample in samples:
        gaps.merge(sample.gaps)
    seconds = gaps.percentile(50)
    return None if seconds is None else 1000 * seconds


def _added(own: Mapping[int, float], base: Mapping[int, float]) -> Spread | None:
    return Spread.of(own[number] - base[number] for number in own if number in base)


def _milliseconds(seconds: Percentiles | None) -> Percentiles | None:
    return seconds and Percentiles(1000 * seconds.p50, 1000 * seconds.p90, 1000 * seconds.p99)
