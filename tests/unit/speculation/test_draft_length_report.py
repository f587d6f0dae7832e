"""From the controller, through the file, into metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.telemetry import Telemetry
from dflash_serve import metrics
from dflash_serve.speculation.controller import DraftLengthController
from dflash_serve.speculation.report import read_report, write_report
from dflash_serve.speculation.step_cost import generic


class Recorded:
    """In place of one of Ray's metrics."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.values.append(value)

    set = observe = inc


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> tuple[Telemetry, dict[str, Recorded]]:
    made: dict[str, Recorded] = {}

    def make(metric: metrics.Metric) -> Recorded:
        return made.setdefault(metric.name, Recorded())

    monkeypatch.setattr("deployments.telemetry._make", make)
    return Telemetry("m", "r"), made


def report() -> dict[str, Any]:
    controller = DraftLengthController((0, 3), generic())
    for _ in range(5):
        controller.observe(4, 3, {(3, 1): 4}, 0.02, since_last=0.02)
    controller.observe(4, 0, {}, 0.01, since_last=0.01)
    controller.choose(4, 0.0)
    return controller.report()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert read_report(path) is None
    write_report(path, report())
    read = read_report(path)
    assert read is not None
    assert read["fresh"]
    assert read["steps_by_draft_tokens"] == {"3": 5, "0": 1}
    assert read["realised_tokens"] == 5 * 4 * 2 + 4
    path.write_text(json.dumps(read | {"written": read["written"] - 60}))
    old = read_report(path)
    assert old is not None
    assert not old["fresh"]


def test_a_folder_that_is_gone_does_not_stop_the_engine(tmp_path: Path) -> None:
    write_report(tmp_path / "gone" / "report.json", report())


def test_counters_move_by_what_is_new_and_gauges_only_while_fresh(
    published: tuple[Telemetry, dict[str, Recorded]],
) -> None:
    telemetry, made = published
    first = report() | {"fresh": True}
    telemetry._publish_draft_length(first)
    telemetry._publish_draft_length(first)
    assert made[metrics.CHOSEN_DRAFT_TOKENS.name].values == [3.0] * 5 + [0.0]
    assert made[metrics.REALISED_TOKENS.name].values == [44]
    assert made[metrics.AUTOREGRESSIVE_SECONDS.name].values == [pytest.approx(0.01)]
    assert made[metrics.DRAFTER_UNPROFITABLE.name].values == [0.0, 0.0]
    telemetry._publish_draft_length(first | {"fresh": False, "realised_tokens": 50})
    assert made[metrics.REALISED_TOKENS.name].values == [44, 6]
    assert len(made[metrics.DRAFTER_UNPROFITABLE.name].values) == 2
