"""The choice of K, with known answers, on made engines."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from dflash_serve.speculation.config import AdaptiveConfig, batch_size_schedule
from dflash_serve.speculation.controller import DraftLengthController, default_choices
from dflash_serve.speculation.estimate import expected_tokens, rate_of_length
from dflash_serve.speculation.step_cost import StepCosts, generic, load

H200 = load("gemma4-31b-h200")
CHAT, MATHS, BROKEN = (rate_of_length(length, 15) for length in (4.19, 8.6, 1.0))


class Engine:
    """Steps of a made engine: true costs, a chance of acceptance for all positions, one K ahead as vLLM has it."""

    def __init__(self, controller: DraftLengthController, costs: StepCosts = H200) -> None:
        self.controller, self.costs = controller, costs
        self.now = 0.0
        self.tokens = 0
        self.chosen: list[int] = []
        self._rng = random.Random(0)
        self._next = controller.choices[-1]

    def run(self, requests: int, rate: float, seconds: float) -> float:
        """Tokens a second that the chosen K are worth: without the luck of single verifications."""
        began, worth = self.now, 0.0
        tokens = expected_tokens([rate] * 15)
        while self.now - began < seconds:
            count, self._next = self._next, self.controller.choose(requests, self.now)
            took = self.costs.step_seconds(requests, count) * self._rng.uniform(0.97, 1.03)
            outcomes: dict[tuple[int, int], int] = {}
            for _ in range(requests):
                accepted = next((i for i in range(count) if self._rng.random() >= rate), count)
                self.tokens += 1 + accepted
                if count:
                    outcomes[count, accepted] = outcomes.get((count, accepted), 0) + 1
            worth += requests * tokens[count]
            self.now += took
            self.controller.observe(requests, count, outcomes, took, since_last=took, steady=count == self._next)
            self.chosen.append(count)
        return worth / (self.now - began)


def best_fixed(requests: int, rate: float, choices: Sequence[int]) -> float:
    tokens = expected_tokens([rate] * 15)
    return max(requests * tokens[count] / H200.step_seconds(requests, count) for count in choices)


@pytest.mark.parametrize("prior", [H200, generic()], ids=["measured", "guessed"])
@pytest.mark.parametrize("rate", [CHAT, MATHS, BROKEN], ids=["chat", "maths", "broken"])
@pytest.mark.parametrize("requests", [1, 8, 32, 64, 128])
def test_in_steady_state_it_is_within_a_few_percent_of_the_best(requests: int, rate: float, prior: StepCosts) -> None:
    engine = Engine(DraftLengthController(default_choices(15), prior))
    engine.run(requests, rate, 3)
    assert engine.run(requests, rate, 6) > 0.95 * best_fixed(requests, rate, range(16))


def test_trials_cost_no_more_than_their_share() -> None:
    """A drafter that never guesses: all that is lost is exploration."""
    engine = Engine(DraftLengthController(default_choices(15), H200, exploration=0.005))
    engine.run(32, BROKEN, 5)
    assert engine.controller.report()["unprofitable"]
    assert engine.run(32, BROKEN, 20) > 0.985 * 32 / H200.step_seconds(32, 0)
    assert engine.controller.totals.trial_steps > 0


@pytest.mark.parametrize("requests", [1, 32, 64])
def test_a_drafter_that_recovers_is_used_again(requests: int) -> None:
    engine = Engine(DraftLengthController(default_choices(15), H200))
    engine.run(requests, BROKEN, 10)
    assert engine.controller.draft_tokens == 0
    engine.run(requests, MATHS, 6)
    assert engine.controller.draft_tokens >= 5


def test_traffic_that_changes_is_followed_within_two_seconds() -> None:
    engine = Engine(DraftLengthController(default_choices(15), H200))
    engine.run(128, CHAT, 5)
    assert engine.controller.draft_tokens == 3
    engine.run(128, MATHS, 2)
    assert engine.controller.draft_tokens == 5
    engine.run(128, CHAT, 2)
    assert engine.controller.draft_tokens == 3


def test_load_that_changes_is_answered_at_once() -> None:
    engine = Engine(DraftLengthController(default_choices(15), H200))
    engine.run(1, MATHS, 3)
    assert engine.controller.draft_tokens == 15
    engine.run(64, MATHS, 0.2)
    assert engine.controller.draft_tokens <= 7


def test_without_exploration_nothing_is_tried() -> None:
    controller = DraftLengthController((0, 3, 7, 15), H200, exploration=0.0)
    controller._budget_seconds = 0.0
    engine = Engine(controller)
    engine.run(32, MATHS, 3)
    assert controller.totals.trial_steps == 0


def test_a_forced_k_stays() -> None:
    engine = Engine(DraftLengthController((0, 3, 7), H200))
    engine.controller.force(3)
    engine.run(8, BROKEN, 1)
    assert set(engine.chosen[1:]) == {3}
    engine.controller.force(None)
    engine.run(8, BROKEN, 3)
    assert engine.controller.draft_tokens == 0
    with pytest.raises(ValueError, match=r"one of \[0, 3, 7\]; it is 4"):
        engine.controller.force(4)


def test_the_report_adds_up() -> None:
    engine = Engine(DraftLengthController((0, 3, 7), H200))
    engine.run(16, CHAT, 4)
    report = engine.controller.report()
    assert sum(report["steps_by_draft_tokens"].values()) == len(engine.chosen)
    assert report["realised_tokens"] == engine.tokens
    assert report["expected_tokens"] == pytest.approx(engine.tokens, rel=0.05)
    assert report["estimated_speedup"] == pytest.approx(
        expected_tokens([CHAT] * 7)[report["draft_tokens"]]
        * H200.step_seconds(16, 0)
        / H200.step_seconds(16, report["draft_tokens"]),
        rel=0.1,
    )
    assert not report["unprofitable"]
    assert report["cost_error_ratio"] < 0.05


def test_a_choice_takes_far_less_than_a_step() -> None:
    """Not a claim of speed: a guard against work that grows with the batch or with history."""
    engine = Engine(DraftLengthController(default_choices(15), H200))
    engine.run(128, CHAT, 5)
    began = time.process_time()
    for index in range(200):
        engine.controller.choose(128, engine.now + index)
    assert (time.process_time() - began) / 200 < 0.002


@pytest.mark.parametrize("choices", [(), (3, 0), (0,), (-1, 3), (3, 3)])
def test_choices_that_do_not_rise_are_refused(choices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="choices must rise"):
        DraftLengthController(choices, H200)


def test_default_choices_end_at_the_longest() -> None:
    assert default_choices(15) == (0, 1, 2, 3, 5, 7, 11, 15)
    assert default_choices(5) == (0, 1, 2, 3, 5)
    assert default_choices(1) == (0, 1)


@pytest.mark.parametrize(("choices", "most"), [((0, 1, 3, 5, 7, 15), 256), ((0, 5), 2), ((0, 1, 2, 3), 4), ((3, 7), 1)])
def test_the_schedule_names_choices_for_every_batch_size(choices: tuple[int, ...], most: int) -> None:
    schedule = batch_size_schedule(choices, most)
    assert [count for _, _, count in schedule] == sorted(choices, reverse=True)[:most]
    covered = [size for start, end, _ in schedule for size in range(start, end + 1)]
    assert covered == list(range(1, most + 1))


def test_the_configuration_survives_vllms_additional_config() -> None:
    config = AdaptiveConfig((0, 3, 7), H200, 0.01)
    assert AdaptiveConfig.from_additional(config.to_additional(), 7) == config
    with pytest.raises(ValueError, match="7 is more than num_speculative_tokens=5"):
        AdaptiveConfig.from_additional(config.to_additional(), 5)
    assert AdaptiveConfig.from_additional({}, 5).choices == default_choices(5)
