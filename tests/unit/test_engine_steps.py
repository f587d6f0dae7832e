"""Where an engine's time goes: what is recorded of a step, and how recordings are read."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import fields, replace
from inspect import getsource, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import engine_steps
from benchmarks.engine_steps import KINDS, Clock, Moment, Recorder, Span, Step, figures, read
from dflash_serve.bench.overhead import HIGH_THROUGHPUT, PLAIN, VLLM


def scheduled(new: list[str], tokens: dict[str, int], finished: tuple[str, ...] = ()) -> Any:
    """As vLLM's scheduler gives it."""
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


class Engine:
    """A recorder, and its thread's clock: each moment has half of its time as CPU time, a tenth as waiting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.milliseconds = 0
        file = (folder / "steps-7.jsonl").open("w")
        file.write(json.dumps({"side": VLLM}) + "\n")
        self.recorder = Recorder(file, self.moment)

    def moment(self) -> Moment:
        at = self.milliseconds / 1000
        return Moment(at, at / 2, at / 10, self.milliseconds)

    def arrive(self, request: str, at: int) -> None:
        self.recorder.arrived(request, at / 1000)

    def launch(self, begin: int, end: int, step: Any) -> None:
        self.milliseconds = begin
        before = self.moment()
        self.milliseconds = end
        self.recorder.launched(step, before, self.moment())

    def answer(self, at: int, *requests: str) -> None:
        self.milliseconds = at
        self.recorder.answered(requests)

    def steps(self) -> list[Step]:
        """All so far: a prompt's step is written at once, with those before it."""
        self.arrive("last", self.milliseconds)
        self.launch(self.milliseconds, self.milliseconds, scheduled(["last"], {"last": 1}))
        self.answer(self.milliseconds, "last")
        return read(self.folder)[VLLM].steps[:-1]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


def test_a_prompt_counts_from_its_arrival_to_its_first_token(engine: Engine) -> None:
    engine.arrive("a", 98)
    engine.launch(100, 130, scheduled(["a"], {"a": 118}))
    engine.answer(140, "other")
    engine.answer(148, "a")
    engine.launch(149, 151, scheduled([], {"a": 1}))
    engine.answer(160, "a")
    prompt, token = engine.steps()
    assert (prompt.requests, prompt.new, prompt.tokens) == (1, 1, 118)
    assert vars(prompt.launch) == pytest.approx({"took_ms": 30, "cpu_ms": 15, "queued_ms": 3, "preempted": 30})
    assert prompt.launch.asleep_ms == pytest.approx(12)
    assert prompt.answer is not None
    assert [prompt.waited_ms, prompt.answer.took_ms, prompt.first_token_ms] == pytest.approx([2, 18, 50])
    assert (token.requests, token.new, token.tokens) == (1, 0, 1)
    assert (token.waited_ms, token.answer, token.first_token_ms) == (None, None, None)


def test_of_several_prompts_the_first_arrival_and_the_first_token_count(engine: Engine) -> None:
    for request, at in (("a", 99), ("b", 50), ("c", 97)):
        engine.arrive(request, at)
    engine.launch(100, 130, scheduled(["a", "b", "c"], {"a": 9, "b": 9, "c": 9, "before": 1}))
    engine.answer(140, "c", "before")
    engine.answer(150, "a", "b")
    (step,) = engine.steps()
    assert (step.requests, step.new, step.tokens) == (4, 3, 28)
    assert step.answer is not None
    assert [step.waited_ms, step.answer.took_ms, step.first_token_ms] == pytest.approx([50, 10, 90])


def test_a_request_that_is_given_up_leaves_nothing_and_one_that_comes_again_is_not_new(engine: Engine) -> None:
    for request in ("gone", "queued", "stays"):
        engine.arrive(request, 10)
    engine.launch(20, 25, scheduled(["gone"], {"gone": 5}))
    engine.launch(30, 31, scheduled([], {}, finished=("gone", "queued")))
    engine.launch(40, 45, scheduled(["stays"], {"stays": 5}))
    engine.launch(50, 55, scheduled(["stays"], {"stays": 6}))
    engine.answer(60, "stays")
    again, first = engine.steps()
    assert (first.new, first.waited_ms, first.first_token_ms) == (1, pytest.approx(30), pytest.approx(50))
    assert (again.new, again.tokens) == (0, 6)
    assert engine.recorder._arrivals == engine.recorder._unanswered == {}


def test_steps_are_told_apart_by_what_they_do() -> None:
    step = Step(requests=1, new=1, tokens=9, launch=Span(1, 1, 0, 0))
    steps = [step, replace(step, requests=3, new=3), replace(step, requests=3)]
    steps += [replace(step, new=0, tokens=1), replace(step, requests=9, new=0), replace(step, new=0)]
    found = [[name for name, belongs in KINDS.items() if belongs(one)] for one in steps]
    assert found == [[name] for name in KINDS]


def test_what_linux_does_not_count_is_left_empty() -> None:
    known = Step(requests=1, new=0, tokens=1, launch=Span(2, 1, 0.5, 0))
    row = "  waiting for a core"
    assert figures([known])[row] == "0.50 (0.50 to 0.50)"
    assert figures([replace(known, launch=Span(2, 1, float("nan"), 0))])[row] == ""


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


def test_the_clock_counts_its_own_threads_time() -> None:
    clock, burnt = Clock(), []

    def burn() -> None:
        began = time.thread_time()
        while time.thread_time() < began + 0.05:
            pass
        burnt.append(time.thread_time() - began)

    before = clock.now()
    thread = threading.Thread(target=burn)
    thread.start()
    thread.join()
    after = clock.now()
    assert after.at - before.at >= burnt[0] >= 0.05
    assert after.cpu - before.cpu < 0.025


def test_an_engine_of_vllm_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm/v1/engine/core.py, with its model, its scheduler and its preprocessing left out."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore

    def step(self: Any) -> tuple[Any, bool]:
        assert self.model_executor.execute_model(self.scheduled, non_block=True) == "a future"
        output = EngineCoreOutput(request_id="a", new_token_ids=[7])
        return {0: EngineCoreOutputs(outputs=[output])}, True

    for name in ("step", "step_with_batch_queue", "preprocess_add_request"):
        monkeypatch.setattr(EngineCore, name, step if "step" in name else lambda self, request: (request, 0))
    engine_steps.install(tmp_path)
    core: Any = EngineCore.__new__(EngineCore)
    core.model_executor = SimpleNamespace(execute_model=lambda scheduler_output, non_block: "a future")
    request = SimpleNamespace(request_id="a")
    assert core.preprocess_add_request(request) == (request, 0)
    core.scheduled = scheduled(["a"], {"a": 5})
    core.step_with_batch_queue()
    core.scheduled = scheduled(["b"], {"b": 5})
    core.preprocess_add_request(SimpleNamespace(request_id="b"))
    core.step()
    (side,) = read(tmp_path).values()
    assert [(one.new, one.tokens) for one in side.steps] == [(1, 5)]
    engine_steps.prepare(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path)


def test_vllm_has_what_the_recorder_stands_in_for() -> None:
    """vllm/v1/engine/core.py, executor/abstract.py, core/sched/output.py, engine/arg_utils.py."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    assert list(signature(EngineCore.preprocess_add_request).parameters) == ["self", "request"]
    for step in (EngineCore.step, EngineCore.step_with_batch_queue):
        assert list(signature(step).parameters) == ["self"]
    assert list(signature(Executor.execute_model).parameters)[:2] == ["self", "scheduler_output"]
    made = getsource(EngineCore.__init__)
    assert made.index("self.model_executor = ") < made.index("self.step_fn = "), "our step is in place when it is bound"
    assert "request_id" in EngineCoreRequest.__struct_fields__
    read_by_us = {"finished_req_ids", "scheduled_new_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens"}
    assert read_by_us <= {field.name for field in fields(SchedulerOutput)}
    assert "req_id" in {field.name for field in fields(NewRequestData)}
    assert engine_steps.ENGINE.keys() <= {field.name for field in fields(EngineArgs)}


def test_without_a_recording_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="an engine records that has its model in its own process"):
        read(tmp_path)
