"""Chooses how many draft tokens (K) the next engine step verifies: the K with the most tokens a second.

Expected tokens of a step are those of `AcceptanceEstimate`, its seconds those of `StepCostModel`. Both learn from the
steps that were run, so a K that was not run for a while is tried now and then: a burst of a few steps, paid from a
budget that is a small share of the engine's time: a drafter that is bad for the traffic costs no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dflash_serve.speculation.estimate import AcceptanceEstimate, expected_tokens
from dflash_serve.speculation.step_cost import StepCostModel, StepCosts, Stretches, band

CANDIDATES = (0, 1, 2, 3, 5, 7, 11, 15, 23, 31)
EXPLORATION = 0.005
"""Share of the engine's time that may be lost to trying other K."""
FIRST_BUDGET_SECONDS = 0.25
LARGEST_BUDGET_SECONDS = 1.0
BURST_STEPS = 4
"""Steps of a trial. The first drafts what the second verifies, so costs are known from the inner ones alone."""
PLENTY = 32
"""Requests of which one step says enough about acceptance."""
SEEN = 0.05
"""Steps that count, from which a cell was measured not long ago: two of them after 370 others."""
SWITCH_GAIN = 0.01
"""A change must promise this much more: estimates are noisy, and a change itself costs a little."""
STALE_SECONDS = 1.25
"""A K tried within this time is not tried again."""
HOPEFUL_RATE = 0.9
"""What a position that was not tried lately might be accepted with, at best."""
WELL_TRIED = 16.0
"""Tries from which a position's chance is taken as known."""


def default_choices(max_draft_tokens: int) -> tuple[int, ...]:
    """No draft, a few lengths, and the longest: few, since each has CUDA graphs of its own."""
    return tuple(sorted({*(count for count in CANDIDATES if count < max_draft_tokens), max_draft_tokens}))


@dataclass
class Totals:
    """Counts since the engine started, of steps that decoded."""

    steps_by_draft_tokens: dict[int, int] = field(default_factory=dict)
    expected_tokens: float = 0.0
    """What the choices promised, in the steps that then ran."""
    realised_tokens: int = 0
    """What the same steps gave."""
    autoregressive_seconds: float = 0.0
    """Time of steps at K = 0."""
    trial_steps: int = 0


class DraftLengthController:
    """One engine's choice of K. Not thread-safe: the scheduler calls it once a step.

    Args:
        choices: The K to choose from, rising; the first is 0 when drafting may be left out.
        costs: Where the step-cost model begins.
        exploration: Share of the engine's time that trials may lose.
    """

    def __init__(
        self,
        choices: Sequence[int],
        costs: StepCosts,
        *,
        estimate: AcceptanceEstimate | None = None,
        exploration: float = EXPLORATION,
    ) -> None:
        if not choices or list(choices) != sorted(set(choices)) or choices[0] < 0 or choices[-1] < 1:
            raise ValueError(f"choices must rise from 0 or more to 1 or more; they are {list(choices)}")
        self.choices = tuple(choices)
        self.costs = StepCostModel(costs, self.choices)
        self._stretches = Stretches(self.costs)
        self.acceptance = estimate or AcceptanceEstimate(self.choices[-1])
        self.totals = Totals()
        self._exploration = exploration
        self._budget_seconds = FIRST_BUDGET_SECONDS if exploration else 0.0
        self._chosen = len(self.choices) - 1
        self._trial: int | None = None
        self._trial_steps_left = 0
        self._tried_at: dict[tuple[int, int], float] = {}
        self._speedup: float | None = None
        self._forced: int | None = None

    def force(self, draft_tokens: int | None) -> None:
        """Always that K, which must be one of `choices`; None: choose again."""
        if draft_tokens is not None and draft_tokens not in self.choices:
            raise ValueError(f"draft_tokens must be one of {list(self.choices)}; it is {draft_tokens}")
        self._forced = draft_tokens

    @property
    def draft_tokens(self) -> int:
        """The K that pays best at present, trials apart."""
        return self.choices[self._chosen]

    def choose(self, requests: int, now: float) -> int:
        """K of the next step.

        Args:
            requests: That will decode in it.
            now: Seconds of a monotonic clock.
        """
        if self._forced is not None:
            return self._forced
        if requests < 1:
            return self.draft_tokens
        tokens = self.acceptance.expected_tokens()
        seconds = self.costs.predict(requests).tolist()
        rates = [tokens[count] / cost for count, cost in zip(self.choices, seconds, strict=True)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] > (1 + SWITCH_GAIN) * rates[self._chosen]:
            self._chosen = best
        self._speedup = rates[self._chosen] / rates[0] if self.choices[0] == 0 else None
        if self._trial is None:
            self._begin_trial(requests, rates, seconds, now)
        index = self._chosen if self._trial is None else self._trial
        self._tried_at[band(requests), index] = now
        if self._trial is not None:
            self.totals.trial_steps += 1
            self._trial_steps_left -= 1
            if self._trial_steps_left == 0:
                self._trial = None
        return self.choices[index]

    def observe(
        self,
        requests: int,
        draft_tokens: int,
        outcomes: Mapping[tuple[int, int], int],
        seconds: float | None,
        *,
        since_last: float,
        prefill_tokens: int = 0,
        prompts_ended: int = 0,
        steady: bool = True,
    ) -> None:
        """What a step that decoded gave.

        Args:
            requests: That gave tokens in it.
            draft_tokens: K of the step.
            outcomes: (draft tokens verified, draft tokens accepted) -> how many requests.
            seconds: What it took; None when it did something else as well (prefill), or one next to it that blurs its
                time.
            since_last: Seconds since the step before it ended, or since this one began if the engine was idle.
            prefill_tokens: Of prompts, that it computed as well.
            prompts_ended: How many of `requests` gave their first token, and did not decode.
            steady: Whether it drafted as many tokens as it verified; its time belongs to no single K otherwise.
        """
        totals = self.totals
        totals.steps_by_draft_tokens[draft_tokens] = totals.steps_by_draft_tokens.get(draft_tokens, 0) + 1
        expected = self.acceptance.expected_tokens()
        verified = 0
        for (count, accepted), number in outcomes.items():
            totals.expected_tokens += number * expected[min(count, len(expected) - 1)]
            totals.realised_tokens += number * (1 + accepted)
            verified += number
        # requests without drafts give one token each
        totals.expected_tokens += requests - verified
        totals.realised_tokens += requests - verified
        self.acceptance.observe(outcomes, since_last)
        self._budget_seconds = min(self._budget_seconds + self._exploration * since_last, LARGEST_BUDGET_SECONDS)
        if draft_tokens == 0:
            totals.autoregressive_seconds += since_last
        if seconds is not None and steady:
            self._stretches.pass_by()
            self.costs.observe(requests, draft_tokens, seconds)
        elif steady and requests > prompts_ended:
            self._stretches.add(requests - prompts_ended, draft_tokens, since_last, prefill_tokens)
        else:
            self._stretches.end()

    def observe_no_decoding(self) -> None:
        """A step gave no token: chunks of prompts alone."""
        self._stretches.end()

    def report(self) -> dict[str, Any]:
        """What metrics are made of; plain values."""
        return {
            "draft_tokens": self.draft_tokens,
            "steps_by_draft_tokens": {str(count): steps for count, steps in self.totals.steps_by_draft_tokens.items()},
            "expected_tokens": self.totals.expected_tokens,
            "realised_tokens": self.totals.realised_tokens,
            "autoregressive_seconds": self.totals.autoregressive_seconds,
            "trial_steps": self.totals.trial_steps,
            "cost_error_ratio": self.costs.error_ratio,
            "estimated_speedup": self._speedup,
            "unprofitable": self.draft_tokens == 0,
        }

    def _begin_trial(self, requests: int, rates: Sequence[float], seconds: Sequence[float], now: float) -> None:
        """Begin one when a neighbour of the choice, or K = 0, could be better, was not tried lately, and the budget
        pays."""
        load = band(requests)
        best_rate = rates[self._chosen]
        hopeful = self._hopeful_tokens()
        others = [self._chosen + 1, self._chosen - 1]
        if self.choices[0] == 0:
            # it leaves out the drafter, so it may be the best where the short drafts beside it are not
            others.append(0)
        for index in dict.fromkeys(others):
            if not 0 <= index < len(self.choices) or index == self._chosen:
                continue
            count = self.choices[index]
            if now - self._tried_at.get((load, index), float("-inf")) < STALE_SECONDS:
                continue
            seen = self.costs.steps_seen(requests, count)
            known = seen >= 2
            hope = hopeful[count] / seconds[index] * (1.0 if known else 1.3)
            if hope <= best_rate * (1 + SWITCH_GAIN):
                continue
            # one step, if only the acceptance of more positions is in question and many requests answer
            burst = 1 if index > self._chosen and requests >= PLENTY and seen > SEEN else BURST_STEPS
            lost = burst * seconds[index] * max(1 - rates[index] / best_rate, 0.02)
            if lost > self._budget_seconds:
                continue
            self._budget_seconds -= lost
            self._trial, self._trial_steps_left = index, burst
            return

    def _hopeful_tokens(self) -> list[float]:
        """Expected tokens at index K if positions hardly tried turned out well."""
        rates = []
        for position, rate in enumerate(self.acceptance.rates()):
            known = min(self.acceptance.tries(position) / WELL_TRIED, 1.0)
            rates.append(max(rate, known * rate + (1 - known) * HOPEFUL_RATE))
        return expected_tokens(rates)
