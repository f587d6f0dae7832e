"""From measured steps to a surface and to the draft lengths worth having."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_serve.settings.profiles import load_profile, profile_names
from dflash_serve.speculation.calibration import choose, loads_up_to, surface, worst_loss
from dflash_serve.speculation.draw import draw
from dflash_serve.speculation.step_cost import StepCosts, load

H200 = load("gemma4-31b-h200")


def test_a_surface_is_made_of_medians_where_every_k_was_measured() -> None:
    samples = {
        (1, 0): [0.010, 0.011, 0.9],
        (1, 3): [0.012],
        # dearer with one request than with two: a machine that was slow for a moment
        (2, 0): [0.009],
        (2, 3): [0.020],
        (4, 0): [0.010],
    }
    made = surface(samples, "here")
    assert made == StepCosts((1, 2), (0, 3), ((0.011, 0.012), (0.011, 0.020)), "here")


def test_without_a_whole_row_there_is_no_surface() -> None:
    with pytest.raises(ValueError, match="no load was measured at every draft length"):
        surface({(1, 0): [0.1], (2, 3): [0.1]}, "")


def test_loads_are_powers_of_two_and_the_most() -> None:
    assert loads_up_to(16) == [1, 2, 4, 8, 16]
    assert loads_up_to(48) == [1, 2, 4, 8, 16, 32, 48]


def test_where_drafts_cost_nothing_two_lengths_are_enough() -> None:
    assert choose(StepCosts((1, 64), (0, 7), ((0.02, 0.02), (0.02, 0.02)))) == (0, 7)


def test_more_lengths_lose_less() -> None:
    few, many = choose(H200, most_choices=3), choose(H200, most_choices=6)
    assert (few[0], few[-1], many[0], many[-1]) == (0, 15, 0, 15)
    assert worst_loss(H200, many) < worst_loss(H200, few)
    assert worst_loss(H200, range(16)) == 0


@pytest.mark.parametrize("name", [name for name in profile_names() if name.startswith("gemma")])
def test_the_gemma_profiles_choices_lose_little_anywhere(name: str) -> None:
    speculation = load_profile(name)["speculation"]
    assert worst_loss(load(speculation["step_costs"]), speculation["draft_token_choices"]) < 0.03


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    paths = [tmp_path / "costs.png", tmp_path / "costs.svg"]
    draw(H200, (0, 3, 7, 15), paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "K that pays best" in paths[1].read_text()
