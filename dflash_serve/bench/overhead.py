"""What our front end costs: plain `vllm serve`, `up --plain` and `up` on the same engine settings, in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dflash_serve.bench.run import PROFILE_MEND, Stage, Start, at_least
from dflash_serve.bench.servers import dflash_server, vllm_server
from dflash_serve.bench.summary import Row
from dflash_serve.bench.tasks import RANDOM
from dflash_serve.hardware import need_profile, this_machine
from dflash_serve.settings.profiles import merge, resolve

VLLM, PLAIN, HIGH_THROUGHPUT = "vllm serve", "up --plain", "up"

SMALLEST_RATIO = 0.98
MOST_ADDED_TTFT_MS = 5.0
PLAIN_RATIO, PLAIN_CONCURRENCY = 0.90, 32

MEANING = (
    "Three ways to the same engine settings on one machine, each in turn, in rounds of alternating order: plain "
    f"`{VLLM}`; `{PLAIN}` (Ray Serve's proxy); `{HIGH_THROUGHPUT}` (HAProxy straight to the replica). Requests of "
    "random words, each with as many output tokens for every side. TTFT and ITL are medians; server CPU is that of all "
    "its processes.",
    "Where engine, front end and load generator share few cores, tokens/s hides a small cost behind a slow engine and "
    "shows a large one as contention; server CPU per token is then the better measure.",
)


SIDES = {"vllm": VLLM, "plain": PLAIN, "up": HIGH_THROUGHPUT}
"""By what `--sides` calls them."""


def stages(args: Mapping[str, Any], concurrencies: Sequence[int], sides: Sequence[str] = tuple(SIDES)) -> list[Stage]:
    """`sides` with the same profile and settings; our limit of requests lets every stream in.

    Raises SettingsError; ValueError on a GPU when the settings name no profile.
    """
    for side in sides:
        if side not in SIDES:
            raise ValueError(f"--sides: no side {side!r}; there are {', '.join(SIDES)}")
    need_profile(args, PROFILE_MEND)
    cluster = this_machine()
    resolved = resolve(args, cluster)
    limit = max(*concurrencies, resolved.settings.limits.max_concurrent_requests)
    # a request waits in the engine's queue on every side alike
    ours = merge(dict(args), {"profile": resolved.profile, "limits": {"max_concurrent_requests": limit}})
    settings = resolve(ours, cluster).settings
    starts: dict[str, Start] = {
        "vllm": lambda folder: vllm_server(folder, settings),
        "plain": lambda folder: dflash_server(folder, ours, plain=True),
        "up": lambda folder: dflash_server(folder, ours),
    }
    return [Stage(SIDES[side], (RANDOM,), starts[side]) for side in sides]


def lengths(tokens: int, spread: float) -> str:
    """How long answers are, for people."""
    least, most = (at_least(tokens * (1 + sign * spread)) for sign in (-1, 1))
    return f"{least} to {most}" if spread else str(tokens)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """The goals, and whether each was met; `speedup` is the share of `vllm serve`'s throughput. A goal that nothing was
    measured for is left out."""
    ours = [row for row in rows if row.side == HIGH_THROUGHPUT]
    ratios = [row.speedup.median for row in ours if row.speedup]
    added = [row.added_ttft_ms.median for row in ours if row.added_ttft_ms]
    plain = [r.speedup.median for r in rows if (r.side, r.concurrency) == (PLAIN, PLAIN_CONCURRENCY) and r.speedup]
    lines = []
    # of answers that came as one event
    without = "" if any(row.ttft_ms for row in ours) else "; what events cost is not in it"
    if ratios:
        lines.append(
            f"Goal: `{HIGH_THROUGHPUT}` keeps {SMALLEST_RATIO:.2f} of `{VLLM}`'s tokens/s at every concurrency: "
            f"{_met(min(ratios) >= SMALLEST_RATIO)} (smallest {min(ratios):.3f}{without})."
        )
    if added:
        lines.append(
            f"Goal: it adds at most {MOST_ADDED_TTFT_MS:.0f} ms to the median TTFT: "
            f"{_met(max(added) <= MOST_ADDED_TTFT_MS)} (largest {max(added):+.1f} ms)."
        )
    for ratio in plain:
        met = _met(ratio >= PLAIN_RATIO)
        lines.append(f"Goal: `{PLAIN}` keeps {PLAIN_RATIO:.2f} at {PLAIN_CONCURRENCY}: {met} ({ratio:.3f}).")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "NOT met"
