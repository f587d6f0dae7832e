"""The load behind the dashboards' previews."""

from __future__ import annotations

from benchmarks.dashboard_preview import prompts


def test_tasks_take_turns() -> None:
    tasks = [task for task, _ in prompts()]
    kinds = set(tasks)
    assert len(kinds) > 1
    assert set(tasks[: len(kinds)]) == kinds
