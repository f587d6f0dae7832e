"""A row as text, the same in terminal, Markdown and HTML."""

from __future__ import annotations

from dflash_serve.bench.card import CARD
from dflash_serve.bench.summary import AUTOREGRESSIVE, Percentiles, Row, Spread

COLUMNS = (
    "at once",
    "task",
    "side",
    "tokens/s",
    "x",
    "card x",
    "acceptance",
    "card",
    "drafted",
    "TTFT ms p50/p90/p99",
    "TPOT ms",
    "ITL ms",
    "requests",
    "failed",
)
CHIEF_COLUMNS = ("at once", "task", "side", "tokens/s", "x", "card x", "acceptance", "failed")
"""Those that fit into 80 columns."""


def cells(row: Row) -> list[str]:
    published = CARD.get((row.task, row.concurrency)) if row.side != AUTOREGRESSIVE else None
    return [
        str(row.concurrency),
        row.task,
        row.side,
        spread(row.tokens_per_second, 1),
        spread(row.speedup, 2),
        f"{published.speedup:.1f}" if published and row.speedup else "",
        f"{row.acceptance_length:.2f}" if row.acceptance_length else "",
        f"{published.acceptance_length:.2f}" if published and row.acceptance_length else "",
        f"{row.drafted:.1f}" if row.drafted else "",
        percentiles(row.ttft_ms),
        percentiles(row.tpot_ms),
        percentiles(row.gap_ms),
        str(row.requests),
        str(row.failed),
    ]


def spread(value: Spread | None, digits: int, sign: str = "") -> str:
    """The median, with smallest and largest when the rounds differ; sign "+" shows that of a positive number too."""
    if value is None:
        return ""
    median, low, high = (f"{number:{sign}.{digits}f}" for number in (value.median, value.low, value.high))
    return median if low == high else f"{median} ({low}{' to ' if sign else '–'}{high})"


def percentiles(value: Percentiles | None) -> str:
    return "" if value is None else " / ".join(figure(number) for number in (value.p50, value.p90, value.p99))


def figure(number: float) -> str:
    """Three figures at most."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
