"""What was measured, before any statistics, and how it is kept in a report's JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from dflash_serve.speculation.acceptance import AcceptanceCounts

STEP = 1.005
"""Ratio of neighbouring bins: a percentile is right within 0.25 %."""
SMALLEST_SECONDS = 1e-6
TOGETHER_SECONDS = 1e-4
"""Events that are read in less lay there, or came in one piece: no engine makes a step in it."""


class LatencyHistogram:
    """Times in bins of equal ratio: a million gaps take a few hundred numbers, and two histograms can be added."""

    def __init__(self, bins: dict[int, int] | None = None) -> None:
        self.bins: Counter[int] = Counter(bins or {})

    def add_all(self, seconds: Iterable[float]) -> None:
        self.bins.update(round(math.log(max(s, SMALLEST_SECONDS) / SMALLEST_SECONDS, STEP)) for s in seconds)

    def merge(self, other: LatencyHistogram) -> None:
        self.bins.update(other.bins)

    @property
    def count(self) -> int:
        return self.bins.total()

    def share_below(self, seconds: float) -> float:
        """Of the times; 0 without any."""
        below = sum(count for bin_, count in self.bins.items() if SMALLEST_SECONDS * STEP**bin_ < seconds)
        return below / self.count if self.bins else 0.0

    def percentile(self, percent: float) -> float | None:
        """Seconds that `percent` of the times do not exceed; None without times."""
        rank, seen = math.ceil(self.count * percent / 100), 0
        for bin_, count in sorted(self.bins.items()):
            seen += count
            if seen >= max(rank, 1):
                return float(SMALLEST_SECONDS * STEP**bin_)
        return None


@dataclass
class Request:
    """`seconds` to the end of the stream; with `error` the figures mean nothing."""

    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float | None
    """None where the stream did not show it: all that came before its end were tokens without text."""
    seconds: float
    error: str | None = None

    @property
    def tpot_seconds(self) -> float | None:
        """Time per output token after the first; None for a single token, and where the first was not seen."""
        if self.completion_tokens < 2 or self.ttft_seconds is None:
            return None
        return (self.seconds - self.ttft_seconds) / (self.completion_tokens - 1)


@dataclass
class Sample:
    """One task at one concurrency on one side in one round."""

    side: str
    task: str
    concurrency: int
    round: int
    seconds: float
    requests: list[Request]
    model: str = ""
    gaps: LatencyHistogram = field(default_factory=LatencyHistogram)
    acceptance: AcceptanceCounts | None = None
    acceptance_source: str | None = None
    """`responses` or `metrics`."""
    client_cpu_share: float = 0.0
    """CPU time of this process over the sample's time: near 1 the client, not the server, is what was measured."""
    server_cpu_seconds: float | None = None
    """Of all the server's processes; None for a server that we did not start."""
    other_cores: float | None = None
    """Cores that neither server nor client kept busy, but something else on the machine did; None as above."""

    @property
    def good(self) -> list[Request]:
        return [request for request in self.requests if request.error is None]

    @property
    def together(self) -> float:
        """Share of the events after a stream's first that were read together with the one before."""
        return self.gaps.share_below(TOGETHER_SECONDS)

    @property
    def completion_tokens(self) -> int:
        return sum(request.completion_tokens for request in self.good)

    def to_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name not in ("requests", "gaps", "acceptance")}
        return {
            **{name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()},
            "requests": [
                [r.prompt_tokens, r.completion_tokens, _rounded(r.ttft_seconds), round(r.seconds, 6), r.error]
                for r in self.requests
            ],
            "gaps": sorted(self.gaps.bins.items()),
            "acceptance": asdict(self.acceptance) if self.acceptance else None,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Sample:
        acceptance = values["acceptance"]
        return cls(
            **values
            | {
                "requests": [Request(*request) for request in values["requests"]],
                "gaps": LatencyHistogram(dict(values["gaps"])),
                "acceptance": AcceptanceCounts(**acceptance) if acceptance else None,
            }
        )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
