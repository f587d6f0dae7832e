"""What the drafter's next block is worth: chances of acceptance by position, learned from verifications.

A verification of K draft tokens that accepts j of them says that positions 0 to j-1 were right and, if j < K, that
position j was wrong. It says nothing of the positions after the first wrong one, nor of those from K on: they were not
tried (arXiv 2602.06036 counts acceptance lengths; the conditional chances here are what makes them comparable between
different K).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

PRIOR_RATE = 0.7
"""Chance that a draft token is right given that all before it were: about 3.3 tokens a verification."""
PRIOR_WEIGHT = 1.0
"""How many tries that counts for."""
CHAIN_WEIGHT = 4.0
"""How many tries the chance of the position before counts for."""
MEMORY_SECONDS = 1.0
"""After so long, what was seen counts 1/e: traffic that changes is followed within two seconds."""
MEMORY_VERIFICATIONS = (64.0, 512.0)
"""But at least so many verifications count, so that few requests are not judged by noise, and no more than so many, so
that much of the past does not hide a change."""
RECENT_VERIFICATIONS = 16
"""The last verifications, which tell what the drafter does now, are held against what was known of it."""
SURPRISE = 12.0
"""How much likelier (in logarithm) the last ones must be under a chance of their own before the past is forgotten: of
unchanged traffic that comes by luck once in some hundred thousand verifications."""
STALE_SECONDS = 2.0
"""What a position gave before it was left untried for longer than this fades, for the traffic may be another now."""
FADE_SECONDS = 1.0


class AcceptanceEstimate:
    """Chances by position, decayed; a position hardly tried takes the chance of the one before it as its prior.

    Args:
        max_draft_tokens: Positions of the draft (K).
    """

    def __init__(
        self,
        max_draft_tokens: int,
        *,
        prior_rate: float = PRIOR_RATE,
        memory_seconds: float = MEMORY_SECONDS,
        memory_verifications: tuple[float, float] = MEMORY_VERIFICATIONS,
    ) -> None:
        self.max_draft_tokens = max_draft_tokens
        self._prior_rate = prior_rate
        self._memory_seconds = memory_seconds
        self._memory_verifications = memory_verifications
        self._tried = [0.0] * max_draft_tokens
        self._accepted = [0.0] * max_draft_tokens
        self._untried_seconds = [0.0] * max_draft_tokens
        self._recent: deque[tuple[int, int]] = deque()
        """By step, of the last verifications: how many, and how many of them accepted the first draft token."""
        self._expected: list[float] | None = None

    def observe(self, outcomes: Mapping[tuple[int, int], int], seconds: float) -> None:
        """Count the verifications of one step.

        Args:
            outcomes: (draft tokens verified, draft tokens accepted) -> how many requests.
            seconds: Since the step before; older steps count less for it.
        """
        tried, accepted = self.counts(outcomes)
        # count / (1 - keep) is what the sum settles at: it must lie within `memory_verifications`
        least, most = (1.0 - tried[0] / verifications for verifications in self._memory_verifications)
        keep = min(max(math.exp(-seconds / self._memory_seconds), least, 0.0), max(most, 0.0))
        if tried[0]:
            self._forget_if_surprised(tried[0], accepted[0])
        for position, count in enumerate(tried):
            if not count:
                # a position that this step did not try keeps what it knows, until it is tried again
                self._untried_seconds[position] += seconds
                continue
            kept = keep * self._freshness(position)
            self._tried[position] = kept * self._tried[position] + count
            self._accepted[position] = kept * self._accepted[position] + accepted[position]
            self._untried_seconds[position] = 0.0
        self._expected = None

    def _forget_if_surprised(self, tried: int, accepted: int) -> None:
        """A drafter that breaks or recovers is no drift to be averaged: begin anew from what was seen since."""
        self._recent.append((tried, accepted))
        while sum(count for count, _ in self._recent) - self._recent[0][0] >= RECENT_VERIFICATIONS:
            self._recent.popleft()
        if self._tried[0] < RECENT_VERIFICATIONS:
            return
        known = (self._accepted[0] + PRIOR_WEIGHT * self._prior_rate) / (self._tried[0] + PRIOR_WEIGHT)
        most, since = SURPRISE, None
        count = right = 0
        for step_tried, step_accepted in reversed(self._recent):
            count, right = count + step_tried, right + step_accepted
            surprise = count * divergence(right / count, known)
            if surprise > most:
                most, since = surprise, (count, right)
        if since is None:
            return
        self._tried = [0.0] * self.max_draft_tokens
        self._accepted = [0.0] * self.max_draft_tokens
        # this step's own are counted after this
        self._tried[0], self._accepted[0] = float(since[0] - tried), float(since[1] - accepted)
        self._recent.clear()

    def counts(self, outcomes: Mapping[tuple[int, int], int]) -> tuple[list[int], list[int]]:
        """Requests that tried each position, and that accepted it."""
        tried, accepted = [0] * self.max_draft_tokens, [0] * self.max_draft_tokens
        for (verified, right), requests in outcomes.items():
            for position in range(right):
                tried[position] += requests
                accepted[position] += requests
            if right < verified:
                tried[right] += requests
        return tried, accepted

    def tries(self, position: int) -> float:
        """How many tries of a position (from 0) say something of the present."""
        return self._tried[position] * self._freshness(position)

    def _freshness(self, position: int) -> float:
        stale = self._untried_seconds[position] - STALE_SECONDS
        return math.exp(-stale / FADE_SECONDS) if stale > 0 else 1.0

    def rates(self) -> list[float]:
        """Chance of each position given that all before it were right."""
        rates: list[float] = []
        before, weight = self._prior_rate, PRIOR_WEIGHT
        for position, (tried, accepted) in enumerate(zip(self._tried, self._accepted, strict=True)):
            fresh = self._freshness(position)
            before = (fresh * accepted + weight * before) / (fresh * tried + weight)
            rates.append(before)
            weight = CHAIN_WEIGHT
        return rates

    def expected_tokens(self) -> Sequence[float]:
        """Tokens that a verification of K gives, bonus token included, at index K from 0 to `max_draft_tokens`."""
        if self._expected is None:
            self._expected = expected_tokens(self.rates())
        return self._expected


def divergence(rate: float, other: float) -> float:
    """Kullback-Leibler divergence of a coin of `rate` from one of `other`, in nats."""
    total = 0.0
    for p, q in ((rate, other), (1 - rate, 1 - other)):
        if p > 0:
            total += p * math.log(p / max(q, 1e-9))
    return total


def expected_tokens(rates: Sequence[float]) -> list[float]:
    """Acceptance length at index K when `rates[i]` is the chance of position i given all before it."""
    lengths, survival = [1.0], 1.0
    for rate in rates:
        survival *= rate
        lengths.append(lengths[-1] + survival)
    return lengths


def rate_of_length(acceptance_length: float, draft_tokens: int) -> float:
    """The chance, the same at each position, at which a verification gives `acceptance_length` tokens.

    Raises ValueError when no chance does: the length lies between 1 and `draft_tokens` + 1.
    """
    if not 1 <= acceptance_length <= draft_tokens + 1:
        raise ValueError(f"acceptance_length must lie between 1 and {draft_tokens + 1}; it is {acceptance_length}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if expected_tokens([middle] * draft_tokens)[-1] < acceptance_length:
            low = middle
        else:
            high = middle
    return (low + high) / 2
