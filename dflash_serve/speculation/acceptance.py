"""Acceptance statistics of one engine: totals since its start and a sliding window.

Acceptance length is tokens per verification, the bonus token included: 1 + accepted draft tokens / verifications
(DFlash, arXiv 2602.06036; vLLM's `SpecDecodingStats` counts a verification as a draft).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

BUCKET_SECONDS = 1.0


@dataclass
class AcceptanceCounts:
    """Counts over some period; `accepted_per_position[i]` = verifications that accepted draft token i (from 0),
    `drafted_per_position[i]` = verifications that checked one there."""

    verifications: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)

    def add(
        self,
        verifications: int,
        draft_tokens: int,
        accepted_tokens: int,
        per_position: Sequence[int],
        drafted_per_position: Sequence[int] = (),
    ) -> None:
        self.verifications += verifications
        self.draft_tokens += draft_tokens
        self.accepted_tokens += accepted_tokens
        _add_each(self.accepted_per_position, per_position)
        _add_each(self.drafted_per_position, drafted_per_position)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per verification, bonus token included; None when nothing was verified."""
        return 1 + self.accepted_tokens / self.verifications if self.verifications else None


def _add_each(totals: list[int], counts: Sequence[int]) -> None:
    totals.extend([0] * (len(counts) - len(totals)))
    for position, count in enumerate(counts):
        totals[position] += count


class AcceptanceWindow:
    """Sums over the last `window_seconds`, kept in one-second buckets: memory is bounded whatever the step rate."""

    def __init__(self, window_seconds: float) -> None:
        if window_seconds < BUCKET_SECONDS:
            raise ValueError(f"window_seconds must be at least {BUCKET_SECONDS}, not {window_seconds}")
        self.window_seconds = window_seconds
        self._buckets: deque[tuple[float, AcceptanceCounts]] = deque()

    def add(
        self, now: float, verifications: int, draft_tokens: int, accepted_tokens: int, per_position: Sequence[int] = ()
    ) -> None:
        """Count what one engine step verified, at `now` (seconds of any monotonic clock)."""
        if not self._buckets or now - self._buckets[-1][0] >= BUCKET_SECONDS:
            self._buckets.append((now, AcceptanceCounts()))
            self._drop_old(now)
        self._buckets[-1][1].add(verifications, draft_tokens, accepted_tokens, per_position)

    def counts(self, now: float) -> AcceptanceCounts:
        """What was counted in the window that ends at `now`."""
        self._drop_old(now)
        total = AcceptanceCounts()
        for _, bucket in self._buckets:
            total.add(bucket.verifications, bucket.draft_tokens, bucket.accepted_tokens, bucket.accepted_per_position)
        return total

    def _drop_old(self, now: float) -> None:
        while self._buckets and now - self._buckets[0][0] > self.window_seconds:
            self._buckets.popleft()
