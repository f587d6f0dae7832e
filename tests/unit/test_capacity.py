"""docs/capacity.md is computed from measured throughput, and says of what."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import capacity


def test_the_committed_table_is_up_to_date() -> None:
    committed = Path(__file__).parents[2] / "docs" / "capacity.md"
    assert committed.read_text() == capacity.report(), "python -m benchmarks.capacity > docs/capacity.md"


def test_every_table_says_what_was_measured() -> None:
    _, *sections = capacity.report().split("\n## ")
    assert len(sections) == 2
    assert all("dummy weights, synthetic acceptance" in section.splitlines()[0] for section in sections)


def test_figures_are_found_by_side_text_and_load(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"side": "AR", "task": "", "requests": 8, "tokens_per_second": 436.3, "steps": 118}\n')
    assert capacity.load(rows) == {("AR", "", 8): 436.3}


def test_replicas_are_rounded_up() -> None:
    assert capacity.replicas(10, 100, 1000) == 1
    assert capacity.replicas(10, 101, 1000) == 2
    assert capacity.gpu_hours_per_million_tokens(1000) == pytest.approx(1 / 3.6)
