"""Pictures of a report. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dflash_serve.bench.card import CARD
from dflash_serve.bench.samples import LatencyHistogram, Sample
from dflash_serve.bench.summary import ALL, Row, Spread

PERCENTS = [*range(1, 100), 99.5]
SHORTEST_MS = 0.1


@dataclass(frozen=True)
class Figure:
    name: str
    png: bytes
    svg: str


PANEL_POINTS, LINE_POINTS = 170, 9
"""Height of a panel's axis, and of a number in it."""


def draw(rows: Sequence[Row], *, overhead: bool, baseline: str, samples: Sequence[Sample]) -> list[Figure]:
    """Of a run: speed-up, acceptance by position, latencies; of `bench overhead`: ratio and added time, latencies."""
    drawings: list[tuple[str, Any]] = []
    if any(row.speedup for row in rows):
        drawings.append(("ratio", _ratio(rows, baseline)) if overhead else ("speedup", _speedup(rows)))
    if any(row.acceptance_by_position for row in rows) and not overhead:
        drawings.append(("acceptance", _acceptance(rows)))
    if any(row.ttft_ms for row in rows):
        drawings.append(("latency", _latency(samples)))
    return [_rendered(name, figure) for name, figure in drawings]


def _panels(count: int, width: float = 4.6) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    # the same report gives the same file
    matplotlib.rcParams["svg.hashsalt"] = "dflash-serve"
    import matplotlib.pyplot as plt

    columns = min(count, 3)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, 3.6 * lines), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    for axis in flat[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    return figure, flat[:count]


def _rendered(name: str, figure: Any) -> Figure:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=120)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    plt.close(figure)
    return Figure(name, png.getvalue(), svg.getvalue())


def _speedup(rows: Sequence[Row]) -> Any:
    """A panel a task: speed-up over concurrency with its spread, the card's as a dashed line."""
    tasks = list(dict.fromkeys(row.task for row in rows if row.speedup))
    figure, axes = _panels(len(tasks), 4)
    top = max(row.speedup.high for row in rows if row.speedup)
    for axis, task in zip(axes, tasks, strict=True):
        for side in dict.fromkeys(row.side for row in rows if row.speedup):
            mine = [
                (row.concurrency, row.speedup) for row in rows if (row.task, row.side) == (task, side) and row.speedup
            ]
            _spreads(axis, mine, label=side)
        published = [(c, value.speedup) for (name, c), value in CARD.items() if name == task]
        if published:
            axis.plot(*zip(*published, strict=True), "--", color="grey", marker=".", label="card (B300, Gemma-4-31B)")
            top = max(top, *(speedup for _, speedup in published))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title("all tasks" if task == ALL else task)
        _concurrency_axis(axis, sorted({row.concurrency for row in rows} | {c for c, _ in published}))
        axis.set_ylabel("tokens/s over autoregressive")
    for axis, task in zip(axes, tasks, strict=True):
        axis.set_ylim(0, top * 1.12)
        for concurrency in {row.concurrency for row in rows}:
            ratios = [
                r.speedup.median
                for r in rows
                if (r.task, r.concurrency) == (task, concurrency) and r.speedup is not None
            ]
            _numbers(axis, concurrency, ratios, top * 1.12 / PANEL_POINTS)
    axes[0].legend(fontsize=8)
    return figure


def _numbers(axis: Any, at: float, values: Sequence[float], per_point: float) -> None:
    """Each value beside its place, pushed up where it would cover the one below. `per_point`: of the axis, a point."""
    free = float("-inf")
    for value in sorted(values):
        place = max(value / per_point, free)
        free = place + LINE_POINTS
        offset = (6, place - value / per_point - 2)
        axis.annotate(f"{value:.2f}", (at, value), offset, textcoords="offset points", fontsize=8)


def _acceptance(rows: Sequence[Row]) -> Any:
    """A panel a side: share of verifications that accept draft token k, a line a task, all concurrencies together."""
    sides = list(dict.fromkeys(row.side for row in rows if row.acceptance_by_position))
    figure, axes = _panels(len(sides), 5.5)
    for axis, side in zip(axes, sides, strict=True):
        for task in dict.fromkeys(row.task for row in rows):
            # greedy: concurrency changes little, and the lowest is the least disturbed
            row = next((r for r in rows if (r.task, r.side) == (task, side) and r.acceptance_by_position), None)
            if row is None:
                continue
            positions = range(1, len(row.acceptance_by_position) + 1)
            style = {"color": "black", "linewidth": 2} if task == ALL else {}
            label = f"{task}: {row.acceptance_length:.2f}"
            axis.plot(positions, row.acceptance_by_position, marker="o", markersize=3, label=label, **style)
            axis.set_xticks(positions)
        axis.set_ylim(0, 1)
        axis.set_xlabel("draft token")
        axis.set_ylabel("share of verifications that accept it")
        axis.set_title(f"{side}, {min(r.concurrency for r in rows)} at once")
        axis.legend(title="acceptance length", fontsize=8, title_fontsize=8)
    return figure


def _latency(samples: Sequence[Sample]) -> Any:
    """Lines of panels: TTFT, TPOT, ITL; each the share of requests (or events) within a time, a line a side."""
    concurrencies = sorted({s.concurrency for s in samples})
    figure, axes = _panels(3 * len(concurrencies), 4)
    for line, concurrency in enumerate(concurrencies):
        for side in dict.fromkeys(s.side for s in samples):
            mine = [s for s in samples if (s.side, s.concurrency) == (side, concurrency)]
            good = [request for sample in mine for request in sample.good]
            gaps = LatencyHistogram()
            for sample in mine:
                gaps.merge(sample.gaps)
            ttft, tpot = LatencyHistogram(), LatencyHistogram()
            ttft.add_all(r.ttft_seconds for r in good if r.ttft_seconds is not None)
            tpot.add_all(r.tpot_seconds for r in good if r.tpot_seconds is not None)
            for offset, histogram in enumerate((ttft, tpot, gaps)):
                values = [histogram.percentile(percent) for percent in PERCENTS]
                if histogram.count:
                    # events that came together lie at the left edge
                    times = [max(1000 * v, SHORTEST_MS) for v in values if v is not None]
                    axes[3 * line + offset].plot(times, PERCENTS, label=side)
        for axis, title in zip(axes[3 * line : 3 * line + 3], ("TTFT", "TPOT", "ITL"), strict=True):
            axis.set_title(f"{title}, {concurrency} at once", fontsize=10)
            _time_axis(axis)
            axis.set_ylabel("% within")
    axes[0].legend(fontsize=8)
    return figure


def _time_axis(axis: Any) -> None:
    """Milliseconds, on a logarithmic scale with about as many labels whatever it spans."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    left, right = axis.get_xlim()
    decades = math.log10(right / left)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter(lambda milliseconds, _: f"{milliseconds:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("ms")


def _ratio(rows: Sequence[Row], baseline: str) -> Any:
    """Throughput over `vllm serve`'s, added median TTFT where streams showed it, and server CPU a token."""
    timed = any(row.added_ttft_ms for row in rows)
    figure, axes = _panels(3 if timed else 2)
    for number, side in enumerate(dict.fromkeys(row.side for row in rows)):
        mine = [row for row in rows if row.side == side]
        style = {"label": side, "color": f"C{number}"}
        if side != baseline:
            _spreads(axes[0], [(row.concurrency, row.speedup) for row in mine if row.speedup], **style)
            if timed:
                _spreads(axes[1], [(row.concurrency, row.added_ttft_ms) for row in mine if row.added_ttft_ms], **style)
        cpu = [(r.concurrency, r.server_cpu_ms_per_token) for r in mine if r.server_cpu_ms_per_token is not None]
        axes[-1].plot([c for c, _ in cpu], [milliseconds for _, milliseconds in cpu], marker="o", **style)
    titles = [f"tokens/s over {baseline}", "added to the median TTFT, ms", "server CPU, ms a token"]
    if not timed:
        titles.pop(1)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        _concurrency_axis(axis, sorted({row.concurrency for row in rows}))
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_ylim(0, 1.05 * axes[0].get_ylim()[1])
    if timed:
        axes[1].axhline(0, color="black", linewidth=0.8)
    axes[-1].set_ylim(bottom=0)
    axes[-1].legend(fontsize=8)
    return figure


def _spreads(axis: Any, points: Sequence[tuple[int, Spread]], **style: str) -> None:
    """Medians over concurrency, with bars from smallest to largest."""
    errors = [[v.median - v.low for _, v in points], [v.high - v.median for _, v in points]]
    where, medians = [c for c, _ in points], [value.median for _, value in points]
    axis.errorbar(where, medians, yerr=errors, marker="o", capsize=3, **style)


def _concurrency_axis(axis: Any, concurrencies: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(concurrencies, [str(c) for c in concurrencies])
    axis.minorticks_off()
    axis.set_xlabel("requests at once")
