"""Rows with known answers, and the JSON that they are made from again."""

from __future__ import annotations

import json
from dataclasses import astuple

import pytest

from dflash_serve.bench.overhead import HIGH_THROUGHPUT, PLAIN, VLLM, verdicts
from dflash_serve.bench.samples import LatencyHistogram, Request, Sample
from dflash_serve.bench.summary import Percentiles, Row, Spread, percentile, summarise
from dflash_serve.speculation.acceptance import AcceptanceCounts


def spread(value: Spread | None) -> tuple[float, ...]:
    assert value is not None
    return astuple(value)


def sample(
    side: str,
    seconds: float,
    *,
    number: int = 0,
    task: str = "gsm8k",
    concurrency: int = 1,
    ttft_seconds: float | None = 1.0,
) -> Sample:
    """Two answers of 101 tokens; tokens/s = 202 / seconds."""
    requests = [Request(10, 101, ttft_seconds, 11.0), Request(10, 101, ttft_seconds, 11.0)]
    return Sample(side, task, concurrency, number, seconds, requests)


def only(rows: list[Row], side: str, task: str = "gsm8k") -> Row:
    (row,) = [row for row in rows if (row.side, row.task) == (side, task)]
    return row


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([1, 2, 3, 4, 5], 50) == 3
    assert percentile([1, 2], 50) == 1.5
    assert percentile([0, 10], 90) == 9
    assert percentile([7], 99) == 7
    assert Percentiles.of([]) is None


def test_a_histogram_is_right_within_a_quarter_of_a_percent_and_adds_up() -> None:
    one, other = LatencyHistogram(), LatencyHistogram()
    one.add_all(n / 1000 for n in range(1, 501))
    other.add_all(n / 1000 for n in range(501, 1001))
    one.merge(other)
    assert one.count == 1000
    for percent in (50, 90, 99):
        assert one.percentile(percent) == pytest.approx(percent / 100, rel=0.0026)
    assert LatencyHistogram().percentile(50) is None


def test_speed_up_is_taken_within_each_round() -> None:
    # the machine was twice as slow in round 1, on both sides; in round 2 DFlash alone was lucky
    samples = [sample("AR", 20.2, number=n) for n in (0, 2)] + [sample("AR", 40.4, number=1)]
    samples += [sample("DFlash", s, number=n) for n, s in enumerate((10.1, 20.2, 5.05))]
    rows = summarise(samples)
    assert spread(only(rows, "AR").tokens_per_second) == pytest.approx((10, 5, 10))
    assert only(rows, "AR").speedup is None
    assert spread(only(rows, "DFlash").speedup) == pytest.approx((2, 2, 4))


def test_all_sums_tokens_and_seconds_of_the_tasks() -> None:
    samples = [sample("AR", 20.2), sample("AR", 60.6, task="mbpp")]
    row = only(summarise(samples), "AR", "all")
    assert row.tokens_per_second.median == pytest.approx(404 / 80.8)
    assert row.requests == 4
    assert not any(row.task == "all" for row in summarise(samples[:1]))


def test_what_is_added_is_taken_within_each_round() -> None:
    times = ((VLLM, 0.1, 0), (PLAIN, 0.12, 0), (VLLM, 0.5, 1), (PLAIN, 0.53, 1), (VLLM, 0.1, 2), (PLAIN, 0.11, 2))
    samples = [sample(side, 10, ttft_seconds=seconds, number=number) for side, seconds, number in times]
    for one, (_, seconds, _) in zip(samples, times, strict=True):
        one.gaps.add_all([seconds] * 3)
    (row,) = [row for row in summarise(samples, VLLM) if row.side == PLAIN]
    assert spread(row.added_ttft_ms) == pytest.approx((20, 10, 30))
    # bins are 0.5 % wide
    assert spread(row.added_gap_ms) == pytest.approx((20, 10, 30), abs=3)


def test_all_leaves_out_a_task_that_one_side_lacks() -> None:
    samples = [sample(side, 10, task=task) for side in ("AR", "DFlash") for task in ("gsm8k", "mbpp")]
    rows = summarise([*samples, sample("AR", 1000, task="math500")])
    assert only(rows, "AR", "all").requests == 4


def test_all_leaves_out_what_a_cut_round_did_not_measure() -> None:
    samples = [sample(side, 10, task=task) for side in ("AR", "DFlash") for task in ("gsm8k", "mbpp")]
    # the second round has both tasks of DFlash and one of AR
    samples += [sample(side, 10, number=1, task=task) for side, task in (("DFlash", "mbpp"), ("AR", "mbpp"))]
    samples += [sample("DFlash", 1000, number=1)]
    assert only(summarise(samples), "DFlash", "all").requests == 6
    assert spread(only(summarise(samples), "DFlash", "all").speedup) == pytest.approx((1, 1, 1))


def test_times_of_failed_requests_do_not_count_but_they_are_shown() -> None:
    measured = sample("AR", 10.1)
    measured.requests.append(Request(0, 0, 0.0, 0.0, "500: broken"))
    row = only(summarise([measured]), "AR")
    assert (row.requests, row.failed, row.tokens_per_second.median) == (3, 1, pytest.approx(20))
    assert row.ttft_ms == Percentiles(1000, 1000, 1000)
    assert row.tpot_ms is not None
    assert row.tpot_ms.p50 == pytest.approx(100)


def test_a_cell_in_which_all_failed_has_no_speed_and_no_times() -> None:
    measured = Sample("AR", "gsm8k", 1, 0, 5.0, [Request(0, 0, 0.0, 0.0, "refused")])
    row = only(summarise([measured]), "AR")
    assert (row.tokens_per_second.median, row.failed, row.ttft_ms) == (0, 1, None)


def test_acceptance_adds_verifications_of_all_rounds() -> None:
    one, other = sample("DFlash", 10), sample("DFlash", 10, number=1)
    one.acceptance, other.acceptance = AcceptanceCounts(10, 30, 12, [7, 3, 2]), AcceptanceCounts(30, 90, 0, [0, 0, 0])
    row = only(summarise([one, other]), "DFlash")
    assert row.acceptance_length == pytest.approx(1.3)
    assert row.acceptance_by_position == pytest.approx((7 / 40, 3 / 40, 2 / 40))
    assert row.drafted == 3


def test_samples_come_back_from_json() -> None:
    before = sample("DFlash", 10.125)
    before.acceptance, before.acceptance_source = AcceptanceCounts(10, 30, 12, [7, 3, 2]), "responses"
    before.gaps.add_all([0.01, 0.02, 0.02])
    before.requests.append(Request(0, 0, 0.0, 0.0, "500: broken"))
    after = Sample.from_json(json.loads(json.dumps(before.to_json())))
    assert summarise([after]) == summarise([before])


def test_front_end_cost_and_its_goals() -> None:
    sides = ((VLLM, 10.0, 0.100), (PLAIN, 12.5, 0.140), (HIGH_THROUGHPUT, 10.1, 0.104))
    samples = [sample(s, seconds, concurrency=32, ttft_seconds=t) for s, seconds, t in sides]
    rows = base, plain, ours = summarise(samples, VLLM)
    assert base.added_ttft_ms is None
    assert spread(plain.added_ttft_ms) == pytest.approx((40, 40, 40))
    assert spread(ours.added_ttft_ms) == pytest.approx((4, 4, 4))
    assert spread(ours.speedup) == pytest.approx((0.990, 0.990, 0.990), abs=1e-3)
    first, second, third = verdicts(rows)
    assert "every concurrency: met (smallest 0.990)" in first
    assert "met (largest +4.0 ms)" in second
    assert "NOT met (0.800)" in third


def test_answers_that_came_in_one_event_tell_no_time_to_the_first_token() -> None:
    sides = ((VLLM, 10.0), (HIGH_THROUGHPUT, 10.1))
    whole = [sample(s, seconds, concurrency=32, ttft_seconds=None) for s, seconds in sides]
    again = [Sample.from_json(json.loads(json.dumps(one.to_json()))) for one in whole]
    rows = _, ours = summarise(again, VLLM)
    assert (ours.ttft_ms, ours.tpot_ms, ours.added_ttft_ms, ours.requests) == (None, None, None, 2)
    (verdict,) = verdicts(rows)
    assert "met (smallest 0.990; what events cost is not in it)" in verdict
