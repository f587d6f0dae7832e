from __future__ import annotations

from deployments.telemetry import by_position
from dflash_serve.metrics import MAX_POSITIONS


def test_positions_are_named_from_one_and_sort_as_numbers() -> None:
    assert by_position([5, 3, 1]) == {"01": 5, "02": 3, "03": 1}
    names = list(by_position([1] * 12))
    assert names == sorted(names)


def test_however_long_the_draft_the_series_are_bounded() -> None:
    labelled = by_position([1] * (MAX_POSITIONS + 8))
    assert len(labelled) == MAX_POSITIONS
    assert labelled[str(MAX_POSITIONS)] == 9
