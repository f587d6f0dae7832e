"""Where an engine's time goes: what is recorded of a step, and how recordings are read."""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import engine_steps
from benchmarks.engine_steps import KINDS, Clock, Moment, Recorder, Step, read
from dflash_serve.bench.overhead import HIGH_THROUGHPUT, PLAIN, VLLM

NOW = Moment(at=100.0, cpu=5.0, queued=1.0, preempted=3)
LATER = Moment(at=100.030, cpu=5.020, queued=1.004, preempted=5)


def scheduled(new: list[str], tokens: dict[str, int]) -> Any:
    """As vLLM's scheduler gives it."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says next: its one element."""
    now = [0.0]
    monkeypatch.setattr(engine_steps.time, "perf_counter", lambda: now[0])
    return now


def record(folder: Path) -> Recorder:
    file = (folder / "steps-7.jsonl").open("w")
    file.write(json.dumps({"side": VLLM}) + "\n")
    return Recorder(file)


def test_a_prompt_counts_from_its_arrival_to_its_first_token(tmp_path: Path, clock: list[float]) -> None:
    recorder = record(tmp_path)
    clock[0] = 99.998
    recorder.arrived("a")
    recorder.launched(scheduled(["a"], {"a": 118}), NOW, LATER)
    clock[0] = 100.048
    recorder.answered(["other"])
    recorder.answered(["a"])
    clock[0] = 100.060
    recorder.launched(scheduled([], {"a": 1}), replace(NOW, at=100.049), replace(LATER, at=100.051))
    recorder.answered(["a"])
    recorder.arrived("b")
    recorder.launched(scheduled(["b"], {"a": 1, "b": 9}), NOW, LATER)
    recorder.answered(["a", "b"])
    prompt, answer, both = read(tmp_path)[VLLM].steps
    assert (prompt.requests, prompt.new, prompt.tokens, prompt.preempted) == (1, 1, 118, 2)
    assert [prompt.launch_ms, prompt.cpu_ms, prompt.queued_ms] == pytest.approx([30, 20, 4])
    assert [prompt.waited_ms, prompt.first_token_ms] == pytest.approx([2, 50])
    assert (answer.requests, answer.new, answer.tokens, answer.waited_ms) == (1, 0, 1, None)
    assert answer.launch_ms == pytest.approx(2)
    assert (both.requests, both.new, both.tokens) == (2, 1, 10)


def test_steps_are_told_apart_by_what_they_do(tmp_path: Path) -> None:
    step = Step(requests=1, new=1, tokens=9, launch_ms=1, cpu_ms=1, queued_ms=0, preempted=0)
    steps = [step, replace(step, requests=3, new=3), replace(step, requests=3), replace(step, new=0)]
    steps.append(replace(step, requests=3, new=0))
    found = [[name for name, belongs in KINDS.items() if belongs(one)] for one in steps]
    assert found == [[name] for name in KINDS]


@pytest.mark.parametrize(
    ("environment", "side"),
    [
        ({"RAY_ADDRESS": "auto"}, VLLM),
        ({"RAY_JOB_ID": "01000000"}, PLAIN),
        ({"RAY_JOB_ID": "01000000", "RAY_SERVE_ENABLE_HA_PROXY": "1"}, HIGH_THROUGHPUT),
    ],
)
def test_an_engine_knows_its_side(environment: dict[str, str], side: str) -> None:
    assert engine_steps._side(environment) == side


def test_the_threads_clock_counts_its_own_time() -> None:
    clock = Clock()
    before = clock.now()
    while clock.now().cpu < before.cpu + 0.002:
        pass
    after = clock.now()
    assert after.at - before.at >= 0.002
    assert after.queued >= before.queued >= 0


def test_vllm_has_what_the_recorder_stands_in_for() -> None:
    """vllm/v1/engine/core.py and executor/abstract.py; a request's id, the tokens of an output."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    assert list(signature(EngineCore.preprocess_add_request).parameters) == ["self", "request"]
    assert all(
        list(signature(step).parameters) == ["self"] for step in (EngineCore.step, EngineCore.step_with_batch_queue)
    )
    assert "scheduler_output" in signature(Executor.execute_model).parameters
    assert "request_id" in EngineCoreRequest.__struct_fields__
    assert "outputs" in EngineCoreOutputs.__struct_fields__
    assert {"request_id", "new_token_ids"} <= set(EngineCoreOutput.__struct_fields__)


def test_without_a_recording_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did an engine record"):
        read(tmp_path)
