"""The choice of K, with known answers, on made engines."""

from __future__ import annotations

import time

import pytest

from dflash_serve.speculation.config import AdaptiveConfig, batch_size_schedule
from dflash_serve.speculation.controller import DraftLengthController, default_choices
from dflash_serve.speculation.estimate import expected_tokens, rate_of_length
from dflash_serve.speculation.simulation import (
    Moment,
    Prompts,
    SimulatedEngine,
    Step,
    best_fixed,
    best_per_request,
    regret,
)
from dflash_serve.speculation.step_cost import StepCosts, generic, load

H200 = load("gemma4-31b-h200")
CHAT, MATHS, BROKEN = (rate_of_length(length, 15) for length in (4.19, 8.6, 1.0))


def engine_of(controller: DraftLengthController) -> SimulatedEngine:
    return SimulatedEngine(controller, H200)


def run(engine: SimulatedEngine, requests: int, rate: float, seconds: float) -> list[Step]:
    return engine.run(seconds, Moment(requests, ((rate,) * 15,)))


@pytest.mark.parametrize("prior", [H200, generic()], ids=["measured", "guessed"])
@pytest.mark.parametrize("rate", [CHAT, MATHS, BROKEN], ids=["chat", "maths", "broken"])
@pytest.mark.parametrize("requests", [1, 32, 128])
def test_in_steady_state_it_is_within_a_few_percent_of_the_best(requests: int, rate: float, prior: StepCosts) -> None:
    engine = engine_of(DraftLengthController(default_choices(15), prior))
    run(engine, requests, rate, 2)
    assert regret(run(engine, requests, rate, 3)) < 0.05


def test_trials_cost_no_more_than_their_share() -> None:
    """A drafter that never guesses: all that is lost is exploration."""
    engine = engine_of(DraftLengthController(default_choices(15), H200, exploration=0.005))
    run(engine, 32, BROKEN, 5)
    assert engine.controller.report()["unprofitable"]
    assert regret(run(engine, 32, BROKEN, 15)) < 0.015
    assert engine.controller.totals.trial_steps > 0


@pytest.mark.parametrize("requests", [1, 32, 64])
def test_a_drafter_that_recovers_is_used_again(requests: int) -> None:
    engine = engine_of(DraftLengthController(default_choices(15), H200))
    run(engine, requests, BROKEN, 10)
    assert engine.controller.draft_tokens == 0
    run(engine, requests, MATHS, 6)
    assert engine.controller.draft_tokens >= 5


def test_traffic_that_changes_is_followed_within_two_seconds() -> None:
    # K = 0 at 128 as it was with vLLM's own KV cache groups; without them it and 3 are worth the same on chat
    dear = StepCosts(H200.requests, H200.draft_tokens, (*H200.seconds[:-1], (0.038143, *H200.seconds[-1][1:])))
    engine = SimulatedEngine(DraftLengthController(default_choices(15), dear), dear)
    run(engine, 128, CHAT, 5)
    assert engine.controller.draft_tokens == 3
    run(engine, 128, MATHS, 2)
    assert engine.controller.draft_tokens == 5
    run(engine, 128, CHAT, 2)
    assert engine.controller.draft_tokens == 3


@pytest.mark.parametrize(("requests", "before"), [(128, BROKEN), (32, CHAT)])
def test_a_slow_phase_of_the_machine_is_not_held_against_a_k_for_ever(requests: int, before: float) -> None:
    """Steps 1.6 times as long for 20 s, measured at what ran then; what did not run then must not stay the better."""
    slow = StepCosts(H200.requests, H200.draft_tokens, tuple(tuple(1.6 * s for s in row) for row in H200.seconds))
    engine = engine_of(DraftLengthController((0, 1, 3, 5, 7, 15), H200))
    engine.costs = slow
    run(engine, requests, before, 10)
    run(engine, requests, MATHS, 10)
    engine.costs = H200
    engine._best.clear()
    run(engine, requests, CHAT, 10)
    run(engine, requests, MATHS, 10)
    assert regret(run(engine, requests, MATHS, 10)) < 0.05


@pytest.mark.parametrize(
    ("prior", "dear", "most"),
    [
        pytest.param(H200, 0, 0.03, id="measured, dearer at K = 0"),
        pytest.param(H200, 3, 0.04, id="measured, dearer from K = 1 on"),
        pytest.param(generic(), 0, 0.03, id="guessed, dearer at K = 0"),
        # what was tried is forgotten, and the guess that it may be cheap comes back
        pytest.param(generic(), 3, 0.08, id="guessed, dearer from K = 1 on"),
    ],
)
def test_where_every_step_has_a_prefill_costs_are_learned_all_the_same(
    prior: StepCosts, dear: int, most: float
) -> None:
    """128 requests with answers of 256 tokens, and an engine that is not what was measured: no step decodes alone."""
    truth = StepCosts(
        H200.requests,
        H200.draft_tokens,
        tuple(
            tuple(1.4 * s if (k > 0) == (dear > 0) else s for k, s in zip(H200.draft_tokens, row, strict=True))
            for row in H200.seconds
        ),
    )
    engine = SimulatedEngine(
        DraftLengthController((0, 1, 3, 5, 7, 15), prior), truth, prompts=Prompts(128, 256, 7.3e-5, notice_seconds=0.02)
    )
    # until the allowance for first trials is spent
    run(engine, 128, CHAT, 25)
    assert sum(step.draft_tokens == 0 for step in engine.steps) >= 4
    assert regret(run(engine, 128, CHAT, 25)) < most


def test_load_that_changes_is_answered_at_once() -> None:
    engine = engine_of(DraftLengthController(default_choices(15), H200))
    run(engine, 1, MATHS, 3)
    assert engine.controller.draft_tokens == 15
    run(engine, 64, MATHS, 0.2)
    assert engine.controller.draft_tokens <= 7


def test_without_exploration_nothing_is_tried() -> None:
    controller = DraftLengthController((0, 3, 7, 15), H200, exploration=0.0)
    engine = engine_of(controller)
    run(engine, 32, MATHS, 3)
    assert controller.totals.trial_steps == 0


def test_a_forced_k_stays() -> None:
    engine = engine_of(DraftLengthController((0, 3, 7), H200))
    engine.controller.force(3)
    run(engine, 8, BROKEN, 1)
    assert {step.draft_tokens for step in engine.steps[1:]} == {3}
    engine.controller.force(None)
    run(engine, 8, BROKEN, 3)
    assert engine.controller.draft_tokens == 0
    with pytest.raises(ValueError, match=r"one of \[0, 3, 7\]; it is 4"):
        engine.controller.force(4)


def test_the_report_adds_up() -> None:
    engine = engine_of(DraftLengthController((0, 3, 7), H200))
    run(engine, 16, CHAT, 4)
    report = engine.controller.report()
    assert sum(report["steps_by_draft_tokens"].values()) == len(engine.steps)
    assert report["realised_tokens"] == engine.realised_tokens
    assert report["expected_tokens"] == pytest.approx(engine.realised_tokens, rel=0.05)
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
    engine = engine_of(DraftLengthController(default_choices(15), H200))
    run(engine, 128, CHAT, 5)
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


def test_the_best_for_all_and_the_bound_for_each() -> None:
    even = Moment(32, ((CHAT,) * 15,))
    count, best = best_fixed(H200, even)
    assert count == 7
    assert best == pytest.approx(even.tokens(7) / H200.step_seconds(32, 7))
    # requests of one kind gain nothing from a K of each one's own; of two kinds they do
    assert best_per_request(H200, even) == pytest.approx(best)
    two = Moment(64, ((MATHS,) * 15, (CHAT,) * 15))
    assert best_per_request(H200, two) / best_fixed(H200, two)[1] > 1.03
