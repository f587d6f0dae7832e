"""Step costs: surfaces, and what an engine's own steps make of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dflash_serve.speculation.step_cost import (
    LONGEST_STRETCH,
    StepCostModel,
    StepCosts,
    StepCostsError,
    Stretches,
    band,
    generic,
    load,
    names,
)

GRID = StepCosts((1, 10), (0, 3, 7), ((0.010, 0.012, 0.014), (0.010, 0.022, 0.034)))


def test_a_surface_gives_its_points_and_lines_between_them() -> None:
    assert GRID.step_seconds(10, 7) == 0.034
    assert GRID.step_seconds(1, 5) == pytest.approx(0.013)
    assert GRID.step_seconds(5.5, 3) == pytest.approx(0.017)


def test_beyond_the_grid_the_line_goes_on_upwards_alone() -> None:
    assert GRID.step_seconds(19, 3) == pytest.approx(0.032)
    assert GRID.step_seconds(1, 9) == pytest.approx(0.015)
    assert GRID.step_seconds(100, 0) == pytest.approx(0.010)


def test_no_line_joins_steps_with_and_without_a_draft() -> None:
    """K = 1 pays for the drafter as K = 3 does: 19 ms by the line from 7 to 3, not 14 by the one from 3 to 0."""
    assert GRID.step_seconds(10, 1) == pytest.approx(0.016)
    assert GRID.step_seconds(10, 0) == 0.010


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, "not a surface of step costs"),
        ({"requests": [1], "draft_tokens": [0, 3], "step_ms": [[1]]}, "seconds must be 1 rows of 2"),
        ({"requests": [2, 1], "draft_tokens": [0], "step_ms": [[1], [1]]}, "requests must rise"),
        ({"requests": [1], "draft_tokens": [0], "step_ms": [[0]]}, "must all be above 0"),
        ({"requests": [1], "draft_tokens": [0], "step_ms": [["fast"]]}, "not a surface of step costs"),
    ],
)
def test_a_bad_surface_says_what_is_wrong(value: dict[str, object], problem: str) -> None:
    with pytest.raises(StepCostsError, match=problem):
        StepCosts.from_json(value)


def test_a_surface_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(GRID.to_json()))
    assert load(str(path)) == GRID
    path.write_text("[1]")
    with pytest.raises(StepCostsError, match="must hold an object"):
        load(str(path))
    path.write_text("{")
    with pytest.raises(StepCostsError, match="is not JSON"):
        load(str(path))


@pytest.mark.parametrize("name", names())
def test_bundled_surfaces_can_be_read_and_rise_with_load(name: str) -> None:
    surface = load(name)
    for count in surface.draft_tokens:
        column = [surface.step_seconds(requests, count) for requests in surface.requests]
        assert column == sorted(column)


def test_an_unknown_surface_names_the_known() -> None:
    with pytest.raises(StepCostsError, match=r"no surface 'h900'; known: .*generic"):
        load("h900")


def test_the_model_finds_costs_that_its_surface_did_not_know() -> None:
    """Begun with a guess for another machine, ten times too fast and flat where this one is steep."""
    model, rng = StepCostModel(generic(), (0, 3, 7)), random.Random(0)

    def true(requests: int, count: int) -> float:
        return 0.2 + 0.01 * requests * (count + 1)

    for _ in range(8):
        for requests in (1, 4, 16):
            for count in (0, 3, 7):
                model.observe(requests, count, true(requests, count) * rng.uniform(0.97, 1.03))
    for requests in (1, 4, 16):
        expected = [true(requests, count) for count in (0, 3, 7)]
        assert model.predict(requests) == pytest.approx(expected, rel=0.06)
    assert model.error_ratio == pytest.approx(0.02, abs=0.02)


def test_a_load_never_seen_is_judged_by_its_neighbours() -> None:
    model = StepCostModel(GRID, (0, 3, 7))
    for _ in range(10):
        model.observe(4, 3, 3 * GRID.step_seconds(4, 3))
    assert model.predict(5)[1] == pytest.approx(3 * GRID.step_seconds(5, 3), rel=0.15)
    assert model.steps_seen(4, 3) == pytest.approx(10, abs=0.5)  # each counts a little less after each later one
    assert model.steps_seen(5, 3) == 0


def test_a_pause_does_not_count_as_a_cost() -> None:
    model = StepCostModel(GRID, (0, 3, 7))
    for _ in range(20):
        model.observe(1, 3, 0.012)
    model.observe(1, 3, 5.0)
    assert model.predict(1)[1] == pytest.approx(0.012, rel=0.05)


def test_stretches_beside_prefills_teach_what_decoding_takes() -> None:
    """Ends of steps are noticed up to 10 ms late; prefill takes a quarter less a token than the model thinks."""
    model, rng, late = StepCostModel(GRID, (0, 3, 7)), random.Random(0), 0.0
    stretches = Stretches(model)
    token_seconds = 0.75 * GRID.token_seconds
    for step in range(160):
        prompt = 16 if step % 2 else 0
        noticed = rng.uniform(0, 0.01) if prompt else 0.0
        seconds = 1.5 * GRID.step_seconds(8, 3) + prompt * token_seconds
        stretches.add(8, 3, seconds + noticed - late, prompt)
        late = noticed
    assert model.predict(8)[1] == pytest.approx(1.5 * GRID.step_seconds(8, 3), rel=0.08)
    assert model.steps_seen(8, 3) > 20


def test_a_stretch_ends_where_k_changes() -> None:
    """Both together would be 30 ms a step."""
    model = StepCostModel(GRID, (0, 3, 7))
    stretches = Stretches(model)
    for _ in range(10):
        for draft_tokens, seconds in ((3, 0.020), (3, 0.020), (7, 0.040), (7, 0.040)):
            stretches.add(8, draft_tokens, seconds, 0)
    stretches.end()
    assert model.predict(8)[1:] == pytest.approx([0.020, 0.040], rel=0.05)


def test_where_most_steps_decode_alone_stretches_say_nothing() -> None:
    model = StepCostModel(GRID, (0, 3, 7))
    stretches = Stretches(model)
    for _ in range(20):
        stretches.pass_by()
    for _ in range(4):
        stretches.add(8, 3, 9.0, 1)
    stretches.end()
    assert model.steps_seen(8, 3) == 0


def test_a_stretch_that_is_mostly_prefill_says_nothing() -> None:
    model = StepCostModel(GRID, (0, 3, 7))
    stretches = Stretches(model)
    for _ in range(LONGEST_STRETCH):
        stretches.add(8, 3, 9.0, 100_000)
    assert model.steps_seen(8, 3) == 0


def test_bands_are_half_doublings() -> None:
    assert [band(n) for n in (1, 2, 3, 4, 6, 8, 128)] == [0, 2, 3, 4, 5, 6, 14]
