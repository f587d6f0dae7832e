"""What our front end costs: plain `vllm serve`, `up --plain` and `up` on the same engine settings, in turn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_serve.bench.run import Stage
from dflash_serve.bench.servers import dflash_server, vllm_server
from dflash_serve.bench.summary import Row
from dflash_serve.bench.tasks import RANDOM
from dflash_serve.hardware import Cluster
from dflash_serve.settings.profiles import merge, resolve

VLLM, PLAIN, HIGH_THROUGHPUT = "vllm serve", "up --plain", "up"

SMALLEST_RATIO = 0.98
MOST_ADDED_TTFT_MS = 5.0
PLAIN_RATIO, PLAIN_CONCURRENCY = 0.90, 32

MEANING = (
    "Three ways to the same engine settings on one machine, each in turn, in rounds of alternating order: plain "
    f"`{VLLM}`; `{PLAIN}` (Ray Serve's proxy); `{HIGH_THROUGHPUT}` (HAProxy straight to the replica). Requests of "
    "random words, always as many output tokens. TTFT and ITL are medians; server CPU is that of all its processes.",
    "Where engine, front end and load generator share few cores, tokens/s hides a small cost behind a slow engine and "
    "shows a large one as contention; server CPU per token is then the better measure.",
)


@dataclass(frozen=True)
class Cost:
    """A row beside `vllm serve`'s at the same concurrency; `row.speedup` is its throughput ratio. None: the base."""

    row: Row
    added_ttft_ms: float | None
    added_gap_ms: float | None


def stages(args: Mapping[str, Any], concurrencies: Sequence[int]) -> list[Stage]:
    """All three sides with the same profile and settings; our limit of requests lets every stream in.

    Raises SettingsError; ValueError on a GPU when the settings name no profile.
    """
    if args.get("profile", "auto") == "auto" and _has_gpu():
        raise ValueError("--settings: name a `profile` in it; which one `auto` would take is known to Ray alone")
    cluster = Cluster(cpus=os.cpu_count() or 1, gpus={})
    resolved = resolve(args, cluster)
    limit = max(*concurrencies, resolved.settings.limits.max_concurrent_requests)
    # a request waits in the engine's queue on every side alike
    ours = merge(dict(args), {"profile": resolved.profile, "limits": {"max_concurrent_requests": limit}})
    settings = resolve(ours, cluster).settings
    return [
        Stage(VLLM, (RANDOM,), lambda folder: vllm_server(folder, settings)),
        Stage(PLAIN, (RANDOM,), lambda folder: dflash_server(folder, ours, plain=True)),
        Stage(HIGH_THROUGHPUT, (RANDOM,), lambda folder: dflash_server(folder, ours)),
    ]


def costs(rows: Sequence[Row]) -> list[Cost]:
    base = {row.concurrency: row for row in rows if row.side == VLLM}
    return [_cost(row, base.get(row.concurrency)) for row in rows]


def _cost(row: Row, base: Row | None) -> Cost:
    if base is None or row is base:
        return Cost(row, None, None)
    ttft = row.ttft_ms.p50 - base.ttft_ms.p50 if row.ttft_ms and base.ttft_ms else None
    gap = row.gap_ms.p50 - base.gap_ms.p50 if row.gap_ms and base.gap_ms else None
    return Cost(row, ttft, gap)


def verdicts(found: Sequence[Cost]) -> list[str]:
    """The goals, and whether each was met. A goal that nothing was measured for is left out."""
    ours = [cost for cost in found if cost.row.side == HIGH_THROUGHPUT and cost.row.speedup]
    plain = [c for c in found if c.row.side == PLAIN and c.row.concurrency == PLAIN_CONCURRENCY and c.row.speedup]
    lines = []
    if ours:
        ratio = min(c.row.speedup.median for c in ours if c.row.speedup)
        lines.append(
            f"Goal: `{HIGH_THROUGHPUT}` keeps {SMALLEST_RATIO:.2f} of `{VLLM}`'s tokens/s at every concurrency: "
            f"{_met(ratio >= SMALLEST_RATIO)} (smallest {ratio:.3f})."
        )
        added = [c.added_ttft_ms for c in ours if c.added_ttft_ms is not None]
        if added:
            lines.append(
                f"Goal: it adds at most {MOST_ADDED_TTFT_MS:.0f} ms to the median TTFT: "
                f"{_met(max(added) <= MOST_ADDED_TTFT_MS)} (largest {max(added):+.1f} ms)."
            )
    for cost in plain:
        assert cost.row.speedup is not None
        ratio = cost.row.speedup.median
        met = _met(ratio >= PLAIN_RATIO)
        lines.append(f"Goal: `{PLAIN}` keeps {PLAIN_RATIO:.2f} at {PLAIN_CONCURRENCY}: {met} ({ratio:.3f}).")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "NOT met"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
