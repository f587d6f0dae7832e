"""From measured steps to a surface of step costs, and to the draft lengths worth having. Pure.

`dflash-serve calibrate` (deployments/calibrate.py) measures; see dflash_serve.speculation.step_cost for what uses it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

from dflash_serve.speculation.estimate import expected_tokens
from dflash_serve.speculation.step_cost import StepCosts

RATES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Chances of acceptance at each position that the choices are to serve: from a broken drafter to the easiest text."""
ACCEPTABLE_LOSS = 0.02
MOST_CHOICES = 6

Samples = Mapping[tuple[int, int], Sequence[float]]
"""Seconds of the measured steps, by requests and K."""


def surface(samples: Samples, about: str) -> StepCosts:
    """Medians of the loads at which every K was measured; steps cannot get cheaper with more requests.

    Raises ValueError when no load has all K.
    """
    counts = sorted({count for _, count in samples})
    loads = [n for n in sorted({n for n, _ in samples}) if all((n, count) in samples for count in counts)]
    if not loads:
        raise ValueError("no load was measured at every draft length")
    rows: list[tuple[float, ...]] = []
    for requests in loads:
        row = tuple(statistics.median(samples[requests, count]) for count in counts)
        rows.append(tuple(map(max, row, rows[-1])) if rows else row)
    return StepCosts(tuple(loads), tuple(counts), tuple(rows), about)


def loads_up_to(most: int) -> list[int]:
    """Powers of two, and the most itself."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def choose(
    costs: StepCosts, *, most_choices: int = MOST_CHOICES, acceptable_loss: float = ACCEPTABLE_LOSS
) -> tuple[int, ...]:
    """The fewest K with which no load of the surface and no chance of RATES loses more than `acceptable_loss` against
    all K; of `most_choices` the best when none of them does. None and the longest are always among them."""
    table, longest = _tokens_a_second(costs), costs.draft_tokens[-1]
    best: tuple[int, ...] = (0, longest)
    for between in range(max(most_choices - 2, 0) + 1):
        candidates = [(0, *some, longest) for some in itertools.combinations(range(1, longest), between)]
        if not candidates:
            break
        best = min(candidates, key=lambda choices: _worst(table, choices))
        if _worst(table, best) <= acceptable_loss:
            break
    return best


def worst_loss(costs: StepCosts, choices: Sequence[int]) -> float:
    """The largest share of the best tokens a second that having only `choices` loses, over loads and RATES."""
    return _worst(_tokens_a_second(costs), choices)


def _worst(table: Sequence[Sequence[float]], choices: Sequence[int]) -> float:
    return max(1 - max(row[count] for count in choices) for row in table)


def _tokens_a_second(costs: StepCosts) -> list[list[float]]:
    """For each load and each of RATES: tokens a second by K, as a share of the best."""
    longest = costs.draft_tokens[-1]
    table = []
    for requests in costs.requests:
        seconds = [costs.step_seconds(requests, count) for count in range(longest + 1)]
        for rate in RATES:
            row = [tokens / cost for tokens, cost in zip(expected_tokens([rate] * longest), seconds, strict=True)]
            table.append([value / max(row) for value in row])
    return table
