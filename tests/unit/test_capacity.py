"""docs/capacity.md is computed from the measured step times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import capacity

ROWS = [{"B": 8, "step_ms": 20.0}, {"B": 32, "step_ms": 50.0}]


def test_the_committed_table_is_up_to_date() -> None:
    committed = Path(__file__).parents[2] / "docs" / "capacity.md"
    assert committed.read_text() == capacity.report(), "python -m benchmarks.capacity > docs/capacity.md"


def test_a_replica_gives_its_requests_tokens_each_step() -> None:
    assert capacity.tokens_per_second(ROWS, 8, 4.0) == pytest.approx(1600)
    assert capacity.step_seconds(ROWS, 20) == pytest.approx(0.035)
    with pytest.raises(ValueError, match="measured were 8 to 32"):
        capacity.step_seconds(ROWS, 64)


def test_replicas_are_rounded_up() -> None:
    assert capacity.replicas(10, 100, 1000) == 1
    assert capacity.replicas(10, 101, 1000) == 2
    assert capacity.gpu_hours_per_million_tokens(1000) == pytest.approx(1 / 3.6)
