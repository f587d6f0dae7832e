"""An engine of known costs and known acceptance, to see what a choice of draft lengths is worth against the best one.

A step verifies what was chosen a step before, as in vLLM, and takes what a surface of step costs says. Tokens are
counted by what the chosen K are worth on average, so that comparisons are free of the luck of single verifications;
what the controller sees is random, as in life.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dflash_serve.speculation.controller import DraftLengthController
from dflash_serve.speculation.estimate import expected_tokens
from dflash_serve.speculation.step_cost import StepCosts

Rates = Sequence[float]
"""Chance of each position of the draft, given that all before it were right."""


@dataclass(frozen=True)
class Moment:
    """Load and traffic: each running request has a kind, in turn."""

    requests: int
    kinds: tuple[Rates, ...]

    def tokens(self, draft_tokens: int) -> float:
        """Tokens of a step, all requests together, on average."""
        worth = [expected_tokens(rates)[draft_tokens] for rates in self.kinds]
        return sum(worth[index % len(worth)] for index in range(self.requests))


@dataclass(frozen=True)
class Step:
    at: float
    """Seconds since the start, when it ended."""
    requests: int
    draft_tokens: int
    seconds: float
    tokens: float
    best_tokens: float
    """What the best K would have given in the same time."""


@dataclass(frozen=True)
class Prompts:
    """What comes in as answers end, and what it does to steps."""

    tokens: int
    answer_tokens: int
    """After which a running request ends and a prompt takes its place."""
    token_seconds: float
    """What a prompt's token adds to its step."""
    notice_seconds: float = 0.0
    """How late, at most, the end of a step is noticed beside a prefill: the next one seems that much shorter."""

    @property
    def seconds_per_output_token(self) -> float:
        return self.tokens * self.token_seconds / self.answer_tokens


NO_PROMPTS = Prompts(0, 1, 0.0)


@dataclass
class SimulatedEngine:
    """Args:
    controller: Asked at every step.
    costs: The truth.
    noise: Standard deviation of a step's time, as a share.
    prompts: Prompts that come as answers end, none by default.
    """

    controller: DraftLengthController
    costs: StepCosts
    noise: float = 0.02
    prompts: Prompts = NO_PROMPTS
    seed: int = 0
    now: float = 0.0
    steps: list[Step] = field(default_factory=list)
    realised_tokens: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._next = self.controller.choices[-1]
        self._best: dict[Moment, float] = {}
        self._answered = 0
        self._late = 0.0
        self._prefilled = False

    def run(self, seconds: float, moment: Callable[[float], Moment] | Moment) -> list[Step]:
        """The steps of so many more seconds under a constant load, or one that changes with time."""
        until, first = self.now + seconds, len(self.steps)
        while self.now < until:
            self._step(moment(self.now) if callable(moment) else moment)
        return self.steps[first:]

    def _step(self, moment: Moment) -> None:
        count, self._next = self._next, self.controller.choose(moment.requests, self.now)
        seconds = self.costs.step_seconds(moment.requests, count) * math.exp(self._random.gauss(0, self.noise))
        ended = 0
        if self.prompts.tokens:
            ended, self._answered = divmod(self._answered, self.prompts.answer_tokens)
            seconds += ended * self.prompts.tokens * self.prompts.token_seconds
        outcomes: dict[tuple[int, int], int] = {}
        for index in range(moment.requests):
            accepted = self._accepted(moment.kinds[index % len(moment.kinds)], count)
            self.realised_tokens += 1 + accepted
            self._answered += 1 + accepted
            if count:
                outcomes[count, accepted] = outcomes.get((count, accepted), 0) + 1
        self.now += seconds
        late = self._random.uniform(0, self.prompts.notice_seconds) if ended else 0.0
        noticed, self._late = seconds - self._late + late, late
        clean = not ended and not self._prefilled
        self._prefilled = bool(ended)
        self.controller.observe(
            moment.requests,
            count,
            outcomes,
            noticed if clean else None,
            since_last=noticed,
            prefill_tokens=ended * self.prompts.tokens,
            steady=count == self._next,
        )
        if moment not in self._best:
            self._best[moment] = best_fixed(self.costs, moment, prompts=self.prompts)[1]
        best = self._best[moment] * seconds
        self.steps.append(Step(self.now, moment.requests, count, seconds, moment.tokens(count), best))

    def _accepted(self, rates: Rates, draft_tokens: int) -> int:
        return next((i for i in range(draft_tokens) if self._random.random() >= rates[i]), draft_tokens)


def tokens_per_second(steps: Sequence[Step]) -> float:
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def regret(steps: Sequence[Step]) -> float:
    """Share of the tokens that the best K of each moment would have given and the chosen ones did not."""
    return 1 - sum(step.tokens for step in steps) / sum(step.best_tokens for step in steps)


def best_fixed(
    costs: StepCosts, moment: Moment, choices: Sequence[int] | None = None, *, prompts: Prompts = NO_PROMPTS
) -> tuple[int, float]:
    """The best K for all requests alike, of all that can be drafted or of `choices`, and its tokens a second."""
    most = len(moment.kinds[0])

    def rate(count: int) -> float:
        tokens = moment.tokens(count)
        return tokens / (costs.step_seconds(moment.requests, count) + tokens * prompts.seconds_per_output_token)

    return max(
        ((count, rate(count)) for count in (range(most + 1) if choices is None else choices)),
        key=lambda pair: pair[1],
    )


def best_per_request(costs: StepCosts, moment: Moment) -> float:
    """Tokens a second if each request had its own K, and a step cost what as many tokens shared evenly cost.

    An upper bound: steps of one length for all replay whole CUDA graphs, mixed ones do not. Draft tokens go to whatever
    request and position is likeliest to be accepted, one after the other.
    """
    survivals: list[float] = []
    for index in range(moment.requests):
        chance = 1.0
        for rate in moment.kinds[index % len(moment.kinds)]:
            chance *= rate
            survivals.append(chance)
    survivals.sort(reverse=True)
    tokens, best = float(moment.requests), moment.requests / costs.step_seconds(moment.requests, 0)
    for drafted, chance in enumerate(survivals, 1):
        tokens += chance
        best = max(best, tokens / costs.step_seconds(moment.requests, drafted / moment.requests))
    return best
