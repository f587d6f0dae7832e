"""Which GPU measurements are begun."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu_session import Step, chosen, may_begin, run, steps, work_through


def test_steps_are_commands_that_exist() -> None:
    every = steps(Path("/out"), Path("/data"))
    assert all(find_spec(step.arguments[0]) for step in every)
    (speed,) = chosen(every, "speed")
    assert speed.arguments[-4:] == ("--data", "/data", "--out", "/out/speed")


def test_steps_are_taken_as_named() -> None:
    every = steps(Path("/out"), None)
    assert [step.name for step in chosen(every, "serve,adaptive")] == ["serve", "adaptive"]
    assert chosen(every, None) == every
    with pytest.raises(ValueError, match="no step 'sreve'; there are adaptive, speed"):
        chosen(every, "sreve")


def test_a_step_that_runs_on_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    server = "import subprocess, sys; p = subprocess.Popen(['sleep', '60'], start_new_session=True); "
    program = server + "print(p.pid, flush=True); p.wait()"
    with (tmp_path / "log").open("wb") as log:
        assert run([sys.executable, "-c", program], log, 1) == "out of time"
        assert run([sys.executable, "-c", "raise SystemExit(3)"], log, 20) == "ended with 3"
    assert not psutil.pid_exists(int((tmp_path / "log").read_text()))


def test_a_step_that_could_not_end_is_not_begun() -> None:
    (serve,) = chosen(steps(Path("/out"), None), "serve")
    assert may_begin(serve, serve.seconds)
    assert not may_begin(serve, serve.seconds / 2)


def test_gpus_share_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expression = "__import__('os').environ['CUDA_VISIBLE_DEVICES']"
    show = ("timeit", "-n1", "-r1", f"print({expression}); __import__('time').sleep(0.3)")
    work_through([*(Step(name, show, 10) for name in "abc"), Step("long", show, 1000)], ["5", "7"], tmp_path, 30)
    gpus = [(tmp_path / f"{name}.log").read_text().split()[0] for name in "abc"]
    assert set(gpus) == {"5", "7"}
    said = capsys.readouterr().out
    assert said.count("ended with 0") == 3
    assert "long: left out" in said


def test_what_fails_on_one_gpu_is_raised_and_begins_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("in the way of its folder")
    steps = [Step("first", ("this",), 10), Step("second", ("this",), 10)]
    with pytest.raises(FileExistsError):
        work_through(steps, ["0"], tmp_path, 30)
    assert not (tmp_path / "second.log").exists()
