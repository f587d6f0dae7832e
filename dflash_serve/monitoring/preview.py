"""Draws a dashboard's panels from real series, as Grafana would lay them out (development only: matplotlib).

python -m dflash_serve.monitoring.preview --prometheus URL --minutes 10 --out docs/dashboards
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dflash_serve.monitoring.prometheus import Prometheus, Series

DASHBOARDS = Path(__file__).parents[2] / "monitoring" / "dashboards"
COLUMN_INCHES, ROW_INCHES = 0.78, 0.42
MAX_LEGEND = 8
STEPS = 120
PALETTE = plt.get_cmap("tab10")


def concrete(expression: str, rate_interval: str = "1m") -> str:
    """A panel's query with Grafana's variables filled in: all models, all replicas."""
    filled = expression.replace("$__rate_interval", rate_interval)
    return re.sub(r"\$(model|replica)\b", ".*", filled)


def draw(board: dict[str, Any], prometheus: Prometheus, start: float, end: float) -> Figure:
    """The dashboard as a figure; panels whose metric nothing exports yet are left blank and say so."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = plt.figure(figsize=(24 * COLUMN_INCHES, rows * ROW_INCHES + 0.6), facecolor="#f4f5f5")
    height = rows + 0.6 / ROW_INCHES
    figure.text(0.006, 1 - 0.3 / (height * ROW_INCHES), board["title"], fontsize=15, weight="bold", va="center")
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, bottom = place["x"] / 24, 1 - (place["y"] + place["h"] + height - rows) / height
        box = (left, bottom, place["w"] / 24, place["h"] / height)
        if panel["type"] == "row":
            figure.text(left + 0.006, bottom + box[3] / 2, f"▾ {panel['title']}", fontsize=11, va="center")
            continue
        _panel(figure, box, panel, prometheus, start, end)
    return figure


def _panel(
    figure: Figure,
    box: tuple[float, float, float, float],
    panel: dict[str, Any],
    prometheus: Prometheus,
    start: float,
    end: float,
) -> None:
    left, bottom, width, height = box
    pad = 0.0025
    frame = figure.add_axes((left + pad, bottom + pad, width - 2 * pad, height - 2 * pad))
    frame.set(xticks=[], yticks=[], facecolor="white")
    for side in frame.spines.values():
        side.set_color("#dcdde0")
    frame.set_title(panel["title"], loc="left", fontsize=9, weight="bold", y=1, pad=-13, x=0.015)
    title = 22 / 72 / figure.get_figheight()
    step = max((end - start) / STEPS, 1)
    found = [
        (_legend(target.get("legendFormat", ""), series.labels), series)
        for target in panel["targets"]
        for series in prometheus.query_range(concrete(target["expr"]), start, end, step)
    ]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        _stat(frame, panel, found, unit)
        return
    if panel["type"] == "timeseries":
        columns, rows = _legend_shape([name for name, _ in found[:MAX_LEGEND]], width)
        title += rows * 11 / 72 / figure.get_figheight()
    inner = figure.add_axes((left + 0.04, bottom + 0.1 * height + pad, width - 0.05, 0.88 * height - title))
    inner.tick_params(labelsize=7, length=2)
    inner.grid(axis="y", color="#eeeeee")
    inner.spines[["top", "right"]].set_visible(False)
    inner.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value, unit)))
    if panel["type"] == "bargauge":
        _bars(inner, found, unit)
    elif panel["type"] == "heatmap":
        _heatmap(inner, found)
    else:
        _lines(inner, panel, found, columns)


def _legend_shape(names: Sequence[str], width: float) -> tuple[int, int]:
    """Columns and rows of a legend above the lines of a panel; `width` is a share of the figure's."""
    if not names:
        return 1, 0
    characters = 24 * COLUMN_INCHES * width / 0.065
    columns = max(1, min(len(names), int(characters / (max(map(len, names)) + 8))))
    return columns, math.ceil(len(names) / columns)


def _stat(axes: Axes, panel: dict[str, Any], found: Sequence[tuple[str, Series]], unit: str) -> None:
    points = [(at, value) for _, series in found for at, value in series.points if not math.isnan(value)]
    if not points:
        axes.text(0.5, 0.42, "no data", ha="center", va="center", color="#888888")
        return
    last = points[-1][1]
    color = "#1f60c4"
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step.get("value") is None or last >= step["value"]:
            color = {"blue": "#1f60c4", "green": "#3f8f3f", "orange": "#e07b00", "red": "#d0312d"}[step["color"]]
    axes.text(0.5, 0.5, text(last, unit), ha="center", va="center", fontsize=19, weight="bold", color=color)
    spark = axes.inset_axes((0, 0, 1, 0.28))
    spark.set_axis_off()
    times, values = zip(*points, strict=True)
    spark.fill_between(times, values, color=color, alpha=0.15, linewidth=0)
    spark.plot(times, values, color=color, linewidth=1)
    spark.set_ylim(0, max(*values, 1e-9) * 1.1)


def _lines(axes: Axes, panel: dict[str, Any], found: Sequence[tuple[str, Series]], columns: int) -> None:
    for index, (name, series) in enumerate(found):
        times = [datetime.fromtimestamp(at, UTC) for at, _ in series.points]
        values = [value for _, value in series.points]
        color = PALETTE(index % 10)
        label = name if index < MAX_LEGEND else "_"
        axes.plot(times, values, linewidth=1.2, color=color, label=label)  # type: ignore[arg-type]
        if len(found) <= 3:
            axes.fill_between(times, values, color=color, alpha=0.08, linewidth=0)  # type: ignore[arg-type]
    defaults = panel["fieldConfig"]["defaults"]
    for step in defaults.get("thresholds", {}).get("steps", []):
        if step.get("value") is not None:
            axes.axhline(step["value"], color="#d0312d", linewidth=0.9, linestyle="--")
    axes.set_ylim(bottom=0, top=defaults.get("max") or axes.get_ylim()[1] * 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
    if found:
        axes.legend(
            fontsize=6.5,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            frameon=False,
            borderaxespad=0.1,
            columnspacing=1,
            handlelength=1.2,
            labelspacing=0.3,
        )


def _bars(axes: Axes, found: Sequence[tuple[str, Series]], unit: str) -> None:
    names = [name for name, _ in found]
    values = [next((v for _, v in reversed(series.points) if not math.isnan(v)), 0.0) for _, series in found]
    drawn = axes.bar(names, values, color="#5794f2")
    axes.bar_label(drawn, [text(value, unit) for value in values], fontsize=7)
    axes.set_ylim(0, 1 if unit == "percentunit" else None)


def _heatmap(axes: Axes, found: Sequence[tuple[str, Series]]) -> None:
    """Cumulative `le` buckets over time, as a count in each bucket."""
    rows = sorted(found, key=lambda item: float(item[0]))
    times = sorted({at for _, series in rows for at, _ in series.points})
    table = [[dict(series.points).get(at, 0.0) for at in times] for _, series in rows]
    inside = [
        table[0],
        *([b - a for a, b in zip(low, high, strict=True)] for low, high in itertools.pairwise(table)),
    ]
    stamps = matplotlib.dates.date2num([datetime.fromtimestamp(at, UTC) for at in times])
    axes.imshow(
        inside,
        aspect="auto",
        origin="lower",
        cmap="Blues",
        extent=(float(stamps[0]), float(stamps[-1]), -0.5, len(rows) - 0.5),
        interpolation="nearest",
    )
    axes.xaxis_date()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
    axes.set_yticks(range(len(rows)), [f"≤ {name}" if name != "+Inf" else "more" for name, _ in rows])
    axes.grid(False)


def _legend(form: str, labels: dict[str, str]) -> str:
    if form == "__auto":
        return str(labels)
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), form)


def text(value: float, unit: str) -> str:
    """A value with its unit, short."""
    if unit == "percentunit":
        return f"{value:.0%}" if abs(value) >= 0.1 or value == 0 else f"{value:.1%}"
    if unit == "percent":
        return f"{value:.0f}%"
    if unit == "bytes":
        return f"{value / 2**30:.1f} GiB"
    if unit == "s":
        return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:.3g} s"
    ending = {"tok/s": " tok/s", "reqps": " req/s", "ops": " /s"}.get(unit, "")
    return (f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}") + ending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="URL (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="how far back (default 10)")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboards"))
    options = parser.parse_args()
    end = time.time()
    save(Prometheus(options.prometheus), end - 60 * options.minutes, end, options.out)


def save(prometheus: Prometheus, start: float, end: float, folder: Path) -> None:
    """One PNG a dashboard."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(DASHBOARDS.glob("*.json")):
        figure = draw(json.loads(path.read_text(encoding="utf-8")), prometheus, start, end)
        figure.savefig(folder / f"{path.stem}.png", dpi=100)
        plt.close(figure)
        print(folder / f"{path.stem}.png")


if __name__ == "__main__":
    main()
