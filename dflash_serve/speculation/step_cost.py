"""What an engine step takes, by requests that run and draft tokens that it verifies.

`StepCosts` is a measured surface (`dflash-serve calibrate` writes one); `StepCostModel` corrects it by the engine's own
steps, so that a surface of other hardware, or none, is only where it begins.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SURFACES = "surfaces"
GENERIC = "generic"

Vector = npt.NDArray[np.float64]


class StepCostsError(ValueError):
    """A surface that is missing or cannot be read."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step at grid points, interpolated between them, linear beyond them.

    `seconds[i][j]`: `requests[i]` requests that each verify `draft_tokens[j]` draft tokens, drafting included.
    """

    requests: tuple[int, ...]
    draft_tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    about: str = ""
    """Hardware, models and versions that it was measured with."""

    def __post_init__(self) -> None:
        shape = (len(self.seconds), *{len(row) for row in self.seconds})
        if shape != (len(self.requests), len(self.draft_tokens)) or min(shape) < 1:
            raise StepCostsError(
                f"seconds must be {len(self.requests)} rows of {len(self.draft_tokens)}; it is {shape}"
            )
        for name, axis in (("requests", self.requests), ("draft_tokens", self.draft_tokens)):
            if list(axis) != sorted(set(axis)):
                raise StepCostsError(f"{name} must rise; it is {list(axis)}")
        if not all(value > 0 for row in self.seconds for value in row):
            raise StepCostsError("seconds must all be above 0")

    def step_seconds(self, requests: float, draft_tokens: float) -> float:
        """Seconds of a step."""
        return _interpolate(self.requests, [self._along(row, draft_tokens) for row in self.seconds], requests)

    @property
    def token_seconds(self) -> float:
        """What one more token costs a large step, a prompt's token as well: the slope at the surface's far corner."""
        row, requests, last = self.seconds[-1], self.requests[-1], self.draft_tokens[-1]
        if len(row) > 1 and row[-1] > row[-2]:
            return (row[-1] - row[-2]) / (requests * (last - self.draft_tokens[-2]))
        # a surface that is level there was not measured up to large steps
        return row[-1] / (requests * (1 + last))

    def _along(self, row: Sequence[float], draft_tokens: float) -> float:
        """K = 0 leaves out the drafter, so no line goes from there to the shortest draft."""
        if self.draft_tokens[0] > 0 or len(row) < 3:
            return _interpolate(self.draft_tokens, row, draft_tokens)
        if draft_tokens <= 0:
            return row[0]
        return max(_interpolate(self.draft_tokens[1:], row[1:], draft_tokens), row[0])

    def to_json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "requests": list(self.requests),
            "draft_tokens": list(self.draft_tokens),
            "step_ms": [[round(1000 * value, 4) for value in row] for row in self.seconds],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepCosts:
        """Raises StepCostsError when `value` is not what `to_json` gives."""
        try:
            return cls(
                requests=tuple(int(n) for n in value["requests"]),
                draft_tokens=tuple(int(k) for k in value["draft_tokens"]),
                seconds=tuple(tuple(float(ms) / 1000 for ms in row) for row in value["step_ms"]),
                about=str(value.get("about", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, StepCostsError):
                raise
            raise StepCostsError(f"not a surface of step costs ({error!r})") from None


def load(name: str) -> StepCosts:
    """A bundled surface by name, or a JSON file by path. Raises StepCostsError."""
    if name == GENERIC:
        return generic()
    if "/" in name or name.endswith(".json"):
        source: Any = Path(name)
    else:
        source = resources.files("dflash_serve.speculation") / SURFACES / f"{name}.json"
        if not source.is_file():
            raise StepCostsError(f"no surface {name!r}; known: {', '.join(names())}, or the path of a .json file")
    try:
        value = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StepCostsError(f"cannot read {name}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except ValueError as error:
        raise StepCostsError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StepCostsError(f"{name} must hold an object, as `dflash-serve calibrate` writes it")
    return StepCosts.from_json(value)


def names() -> list[str]:
    """The bundled surfaces, and `generic`."""
    folder = resources.files("dflash_serve.speculation") / SURFACES
    return sorted(
        [GENERIC, *(path.name.removesuffix(".json") for path in folder.iterdir() if path.name.endswith(".json"))]
    )


def generic() -> StepCosts:
    """A GPU of which nothing is known: steps cost the same until some 256 tokens, then in proportion to tokens.

    In units of a small step; the model's level is learned from the first steps.
    """
    requests = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    draft_tokens = (0, 1, 3, 7, 15)
    knee = 256
    seconds = tuple(
        tuple(0.02 * (1 + (n * (k + 1) / knee) ** 2) ** 0.5 * (1.1 if k else 1.0) for k in draft_tokens)
        for n in requests
    )
    return StepCosts(requests, draft_tokens, seconds, "a guess: no hardware was measured")


def _interpolate(axis: Sequence[float], values: Sequence[float], at: float) -> float:
    """Linear between points; beyond them the line of the two nearest goes on where it rises, and is level else."""
    if len(axis) == 1:
        return values[0]
    right = min(max(bisect.bisect_left(axis, at), 1), len(axis) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (axis[right] - axis[left])
    if not axis[0] <= at <= axis[-1]:
        slope = max(slope, 0.0)
    nearest = right if at > axis[-1] else left
    # half of the smallest known is as low as a guess may go
    return max(values[nearest] + slope * (at - axis[nearest]), min(values) / 2)


CAP = 32.0
"""Steps of a cell that count at most: the last ones."""
SELF_WEIGHT = 16.0
"""How much more a cell's own steps say of it than those of its neighbours."""
WIDTH_REQUESTS = 1.0
WIDTH_DRAFT = 0.75
"""Reach of what a step says of other cells, in doublings of requests and of tokens a request."""
OUTLIER = 0.5
"""A step off by more than this (in logarithm) from a known cell counts as off by this: a pause, not a cost."""
SURPRISE = 1.0
"""The same for the first steps of a cell, once others are known."""
FEW, SOME = 3, 8
"""Steps of a cell that make it known, and of all cells that say what to expect of a new one."""
AGE = 0.99
"""What a step counts after each later one: what was measured in a slow phase, at loads or K that are not run now, must
not rule them out for ever."""
LARGEST_REQUESTS = 1024


class StepCostModel:
    """A surface times what this engine's own steps say of it: a level for all, and a correction by cell.

    A cell is a band of half a doubling of running requests and one K. Cells share what they know with those near, so
    that a K never tried at this load is judged by the same K at another load and by other K at this load.

    Args:
        prior: Where it begins.
        choices: The K that may be asked for.
    """

    def __init__(self, prior: StepCosts, choices: Sequence[int]) -> None:
        self.prior = prior
        self.choices = tuple(choices)
        self._column = {count: index for index, count in enumerate(self.choices)}
        bands = band(LARGEST_REQUESTS) + 1
        size = len(self.choices)
        self._count = np.zeros(bands * size)
        self._residual = np.zeros(bands * size)
        load = np.repeat(np.arange(bands) / 2, size)
        width = np.tile([math.log2(count + 1) for count in self.choices], bands)
        distance = ((load[:, None] - load[None, :]) / WIDTH_REQUESTS) ** 2
        distance += ((width[:, None] - width[None, :]) / WIDTH_DRAFT) ** 2
        self._near = np.exp(-distance / 2)
        np.fill_diagonal(self._near, SELF_WEIGHT)
        self._priors: dict[int, Vector] = {}
        self.error_ratio: float | None = None
        """Decayed mean of |step / prediction - 1|; None before a known cell was seen again."""

    def predict(self, requests: int) -> Vector:
        """Seconds of a step with so many running requests, for each of `choices`."""
        start = self._start(requests)
        rows = self._near[start : start + len(self.choices)]
        level = self._level()
        known = rows @ (self._count * (self._residual - level)) / (rows @ self._count + 1.0)
        predicted: Vector = self._prior_row(requests) * np.exp(level + known)
        return predicted

    def observe(self, requests: int, draft_tokens: int, seconds: float, steps: int = 1, *, exact: bool = True) -> None:
        """Count steps that each verified and drafted `draft_tokens` for each of `requests`.

        Args:
            seconds: Of one of them, all that is not decoding left out.
            steps: How many, if `seconds` is their mean.
            exact: Whether nothing had to be left out; `error_ratio` is of such steps.
        """
        column = self._column.get(draft_tokens)
        if column is None or seconds <= 0:
            return
        cell = self._start(requests) + column
        prior = float(self._prior_row(requests)[column])
        off = math.log(seconds / prior)
        count = float(self._count[cell])
        if count >= FEW:
            expected = float(self._residual[cell])
            if exact:
                error = abs(math.exp(off - expected) - 1)
                before = error if self.error_ratio is None else self.error_ratio
                self.error_ratio = before + 0.05 * (error - before)
            off = min(max(off, expected - OUTLIER), expected + OUTLIER)
        elif self.has_level:
            expected = math.log(float(self.predict(requests)[column]) / prior)
            off = min(max(off, expected - SURPRISE), expected + SURPRISE)
        aged = AGE**steps
        self._count *= aged
        self._count[cell] = count = min(count * aged + steps, CAP)
        self._residual[cell] += (off - self._residual[cell]) * min(steps / count, 1.0)

    def prefill_seconds(self, tokens: int) -> float:
        """What `tokens` of prompts add to a step that decodes as well."""
        return tokens * self.prior.token_seconds * math.exp(self._level())

    def expected_seconds(self, requests: int, draft_tokens: int) -> float:
        """What a step would take by the surface and the level of all steps, that cell's own left out."""
        return float(self._prior_row(requests)[self._column[draft_tokens]]) * math.exp(self._level())

    @property
    def has_level(self) -> bool:
        """Whether enough steps were seen to tell the machine from the surface's."""
        return float(self._count.sum()) >= SOME

    def steps_seen(self, requests: int, draft_tokens: int) -> float:
        """How many steps of that cell count."""
        return float(self._count[self._start(requests) + self._column[draft_tokens]])

    def _level(self) -> float:
        return float(self._count @ self._residual) / (float(self._count.sum()) + 1e-9)

    def _start(self, requests: int) -> int:
        return band(min(max(requests, 1), LARGEST_REQUESTS)) * len(self.choices)

    def _prior_row(self, requests: int) -> Vector:
        row = self._priors.get(requests)
        if row is None:
            row = np.array([self.prior.step_seconds(requests, count) for count in self.choices])
            self._priors[requests] = row
        return row


LONGEST_STRETCH = 8
"""Steps after which a stretch is counted, though it might go on."""
LARGEST_PREFILL = 1.0
"""Of the decoding beside it: a stretch with more prefill says too little of what decoding takes."""
MOSTLY_ALONE = 0.5
"""Share of steps that decode alone from which those say enough."""
ALONE_WEIGHT = 0.05


class Stretches:
    """Teaches a model by steps that ran beside prefills, or next to such: many at once, less what the prefill takes.

    At high load there may be hardly any others: each answer that ends lets in a prompt. Where steps overlap (vLLM's
    asynchronous scheduling) the end of a step is noticed late while a prefill is being launched, so that one step seems
    too long and the next too short. Of consecutive steps at one K the sum is right but for its two ends.

    What prefill takes is known roughly alone. As tokens of prompts come with tokens of answers, an error adds about the
    same to the seconds a token of every K that is learned so; where most steps decode alone they are not mixed with it.
    """

    def __init__(self, model: StepCostModel) -> None:
        self._model = model
        self._draft_tokens = 0
        self._steps = self._requests = self._prefill_tokens = 0
        self._seconds = 0.0
        self._alone = 0.0
        """Decayed share of the steps that decoded alone."""

    def pass_by(self) -> None:
        """A step that decoded alone, which is counted elsewhere."""
        self._alone += ALONE_WEIGHT * (1 - self._alone)
        self.end()

    def add(self, requests: int, draft_tokens: int, seconds: float, prefill_tokens: int) -> None:
        """A step that verified and drafted `draft_tokens` for each of `requests`, beside that many of prompts."""
        self._alone -= ALONE_WEIGHT * self._alone
        if self._steps and (
            draft_tokens != self._draft_tokens or abs(band(requests) - band(self._requests // self._steps)) > 1
        ):
            self.end()
        self._draft_tokens = draft_tokens
        self._steps += 1
        self._requests += requests
        self._seconds += seconds
        self._prefill_tokens += prefill_tokens
        if self._steps == LONGEST_STRETCH:
            self.end()

    def end(self) -> None:
        """What comes next belongs to another stretch."""
        steps, model = self._steps, self._model
        if steps and self._draft_tokens in model.choices and self._alone < MOSTLY_ALONE:
            requests = round(self._requests / steps)
            prefill = model.prefill_seconds(self._prefill_tokens)
            decoding = steps * model.expected_seconds(requests, self._draft_tokens)
            if prefill <= LARGEST_PREFILL * decoding:
                # half of what was thought is as little as an error in the prefill's share may make of it
                took = max(self._seconds - prefill, decoding / 2) / steps
                # what comes first may be the time that a kernel took to compile
                model.observe(requests, self._draft_tokens, took, steps if model.has_level else 1, exact=False)
        self._steps = self._requests = self._prefill_tokens = 0
        self._seconds = 0.0


def band(requests: int) -> int:
    """Half doublings: 1, 2, 3, 4, 6, 8, 12, 16, … requests each begin a band of their own."""
    return round(2 * math.log2(requests))
