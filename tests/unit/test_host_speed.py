"""The same work again and again."""

from __future__ import annotations

from benchmarks.host_speed import Repetitions


def test_what_took_longer_than_the_quick_ones_was_slowed() -> None:
    text = str(Repetitions(wall=[36.0] * 15 + [56.0] * 5, cpu=[53.0] + [35.0] * 15 + [53.0, 52.0, 53.0, 54.0]))
    assert text.startswith("20 times, ms: 10th percentile 36.0, median 36.0, 90th 56.0, largest 56.0")
    assert "CPU time: 10th percentile 35.0, median 35.0, 90th 53.0" in text
    assert "25% took more than 1.2 times" in text
    assert text.endswith("on median 53.0, at most 4 one after the other")
    assert str(Repetitions(wall=[36.0] * 9, cpu=[35.0] * 9)).endswith("90th 35.0")
