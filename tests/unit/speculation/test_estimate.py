"""Chances of acceptance by position, with known answers."""

from __future__ import annotations

import math
import random

import pytest

from dflash_serve.speculation.estimate import (
    PRIOR_RATE,
    AcceptanceEstimate,
    divergence,
    expected_tokens,
    rate_of_length,
)


def step(rates: list[float], draft_tokens: int, requests: int, rng: random.Random) -> dict[tuple[int, int], int]:
    """Outcomes of one step when `rates` are true."""
    outcomes: dict[tuple[int, int], int] = {}
    for _ in range(requests):
        accepted = next((i for i in range(draft_tokens) if rng.random() >= rates[i]), draft_tokens)
        outcomes[draft_tokens, accepted] = outcomes.get((draft_tokens, accepted), 0) + 1
    return outcomes


def watched(rates: list[float], draft_tokens: int, *, steps: int = 60, requests: int = 32) -> AcceptanceEstimate:
    estimate, rng = AcceptanceEstimate(len(rates)), random.Random(0)
    for _ in range(steps):
        estimate.observe(step(rates, draft_tokens, requests, rng), 0.02)
    return estimate


def test_expected_tokens_sum_the_chances_of_getting_so_far() -> None:
    assert expected_tokens([0.5, 0.5]) == [1.0, 1.5, 1.75]
    assert expected_tokens([]) == [1.0]


@pytest.mark.parametrize("length", [1.0, 4.19, 8.6, 15.9])
def test_a_length_has_one_rate(length: float) -> None:
    assert expected_tokens([rate_of_length(length, 15)] * 15)[-1] == pytest.approx(length, abs=1e-6)


def test_a_length_that_no_rate_gives_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 8; it is 9"):
        rate_of_length(9, 7)


def test_before_anything_was_seen_the_prior_holds_at_every_position() -> None:
    assert AcceptanceEstimate(3).rates() == pytest.approx([PRIOR_RATE] * 3)


def test_what_is_tried_is_learned_position_by_position() -> None:
    rates = [0.9, 0.6, 0.8, 0.5]
    assert watched(rates, 4).rates() == pytest.approx(rates, abs=0.1)


def test_a_verification_says_nothing_of_positions_after_the_first_wrong_one() -> None:
    tried, accepted = AcceptanceEstimate(4).counts({(4, 1): 3, (2, 2): 5})
    assert tried == [8, 8, 0, 0]
    assert accepted == [8, 5, 0, 0]


def test_short_verifications_say_nothing_of_later_positions() -> None:
    """Acceptance is not low there, it is unknown: the chance of the last tried position goes on."""
    rates = watched([0.9] * 15, 3).rates()
    assert rates[3:] == pytest.approx([rates[2]] * 12)
    assert rates[14] > 0.8


def test_a_change_of_traffic_is_followed_within_two_seconds() -> None:
    estimate, rng = AcceptanceEstimate(7), random.Random(1)
    for rate, length in ((0.9, 7), (0.3, 7)):
        for _ in range(100):
            estimate.observe(step([rate] * 7, length, 32, rng), 0.02)
        assert estimate.rates()[0] == pytest.approx(rate, abs=0.08)


def test_few_requests_are_not_judged_by_the_last_second_alone() -> None:
    """One request, slow steps: 64 verifications count, not the 10 of the last second."""
    estimate, rng = AcceptanceEstimate(5), random.Random(2)
    for _ in range(400):
        estimate.observe(step([0.7] * 5, 5, 1, rng), 0.1)
    assert estimate.tries(0) == pytest.approx(64, rel=0.02)


def test_what_was_not_tried_for_long_fades() -> None:
    estimate = watched([0.95] * 7, 7)
    known = estimate.rates()[6]
    for _ in range(500):
        estimate.observe({(1, 0): 32}, 0.02)
    assert estimate.tries(6) < 1
    assert estimate.rates()[6] < 0.3 < known


def test_steps_without_drafts_change_nothing_but_age() -> None:
    estimate = watched([0.8] * 3, 3)
    before = estimate.rates()
    estimate.observe({}, 0.5)
    assert estimate.rates() == before


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.0), (0.02, 0.95)])
def test_a_drafter_that_breaks_or_recovers_is_seen_within_a_few_verifications(before: float, after: float) -> None:
    """One request: averaged with the 64 before, it would take a hundred."""
    estimate, rng = AcceptanceEstimate(3), random.Random(3)
    for _ in range(100):
        estimate.observe(step([before] * 3, 3, 1, rng), 0.02)
    for _ in range(10):
        estimate.observe(step([after] * 3, 3, 1, rng), 0.02)
    assert estimate.rates()[0] == pytest.approx(after, abs=0.15)


def test_luck_is_not_a_surprise() -> None:
    """What changes no more than chance has it is averaged: an estimate begun anew every now and then would be noise."""
    estimate, rng = AcceptanceEstimate(3), random.Random(4)
    seen = []
    for index in range(3000):
        estimate.observe(step([0.75] * 3, 3, 1, rng), 0.02)
        if index > 100:
            seen.append(estimate.rates()[0])
    assert min(seen) > 0.5
    assert max(seen) < 0.95


def test_divergence_is_that_of_two_coins() -> None:
    assert divergence(0.5, 0.5) == 0
    assert divergence(1.0, 0.5) == pytest.approx(math.log(2))
