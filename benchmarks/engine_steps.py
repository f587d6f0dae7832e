"""Where the time from a request's arrival in vLLM's engine to its first token goes, step by step, on any side.

    python -m benchmarks.engine_steps FOLDER

`benchmarks.gemma4_bench overhead --steps` and `benchmarks.front_end_paced --steps` have each side's engine record its
steps into FOLDER (`install`); this prints what they took. A prompt that is read alone is
launched by the CPU while nothing else keeps the GPU busy, so what the CPU loses there is added to the TTFT.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from dflash_serve.bench.overhead import HIGH_THROUGHPUT, PLAIN, VLLM
from dflash_serve.bench.summary import percentile

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

VARIABLE = "DFLASH_ENGINE_STEPS"
"""Of the environment: the folder into which an engine records."""
ENGINE = {"worker_extension_cls": "benchmarks.engine_recorder.Extension"}
"""Engine settings with which an engine records, if it runs the model in its own process."""


@dataclass(frozen=True)
class Moment:
    """Of the calling thread. Seconds."""

    at: float
    cpu: float
    queued: float
    """Ready to run, but another thread had the core."""
    preempted: int


class Clock:
    """Of the thread that makes it; a reading takes microseconds, of which a step has two."""

    def __init__(self) -> None:
        try:
            self._scheduling = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._scheduling = -1

    def now(self) -> Moment:
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        return Moment(time.perf_counter(), time.thread_time(), self._queued_seconds(), usage.ru_nivcsw)

    def _queued_seconds(self) -> float:
        """Linux's, nanoseconds in the second field; 0 where it is not kept."""
        if self._scheduling < 0:
            return 0.0
        return int(os.pread(self._scheduling, 64, 0).split()[1]) / 1e9


@dataclass
class Step:
    """One pass of the model. Times in milliseconds."""

    requests: int
    new: int
    """Requests of it whose prompts it begins to read."""
    tokens: int
    launch_ms: float
    """Until the engine's thread has handed everything to the device."""
    cpu_ms: float
    """The thread's CPU time of that."""
    queued_ms: float
    """Of it, the time that the thread waited for a core."""
    preempted: int
    waited_ms: float | None = None
    """From a new request's arrival in the engine's process to the launch; None without a new one."""
    first_token_ms: float | None = None
    """From that arrival until the engine has the request's first token."""

    @property
    def alone(self) -> bool:
        """It reads one prompt, and does nothing else."""
        return self.new == self.requests == 1


class Recorder:
    """The engine's thread calls all but `arrived`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._arrivals: dict[str, float] = {}
        self._unanswered: dict[str, Step] = {}

    def arrived(self, request_id: str) -> None:
        """The thread that reads requests from the front end has one."""
        self._arrivals[request_id] = time.perf_counter()

    def launched(self, scheduled: SchedulerOutput, before: Moment, after: Moment) -> None:
        """A step that computes something, its launch from `before` to `after`."""
        new = [request.req_id for request in scheduled.scheduled_new_reqs]
        step = Step(
            requests=len(scheduled.num_scheduled_tokens),
            new=len(new),
            tokens=scheduled.total_num_scheduled_tokens,
            launch_ms=1000 * (after.at - before.at),
            cpu_ms=1000 * (after.cpu - before.cpu),
            queued_ms=1000 * (after.queued - before.queued),
            preempted=after.preempted - before.preempted,
        )
        known = [request for request in new if request in self._arrivals]
        if known:
            step.waited_ms = 1000 * (before.at - min(self._arrivals[request] for request in known))
            self._unanswered |= dict.fromkeys(known, step)
        else:
            self._write(step)

    def answered(self, request_ids: Iterable[str]) -> None:
        """The engine has tokens of these requests."""
        for request in self._unanswered.keys() & set(request_ids):
            step, arrived = self._unanswered.pop(request), self._arrivals.pop(request)
            if step.first_token_ms is None:
                step.first_token_ms = 1000 * (time.perf_counter() - arrived)
                self._write(step)

    def _write(self, step: Step) -> None:
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in vars(step).items()}
        self._file.write(json.dumps(rounded) + "\n")
        if step.new:
            self._file.flush()


def install(folder: Path) -> None:
    """Have the engine of this process record its steps into `folder`; nothing is written where none runs."""
    from vllm.v1.engine.core import EngineCore

    if hasattr(EngineCore, VARIABLE):
        return
    recorder: Recorder | None = None
    preprocess = EngineCore.preprocess_add_request

    def preprocess_add_request(self: EngineCore, request: Any) -> Any:
        nonlocal recorder
        if recorder is None:
            recorder = Recorder(_open(folder))
            _time_launches(self.model_executor, recorder)
        recorder.arrived(request.request_id)
        return preprocess(self, request)

    def recorded(step: Callable[[EngineCore], Any]) -> Callable[[EngineCore], Any]:
        def run(self: EngineCore) -> Any:
            outputs, executed = step(self)
            if recorder is not None and outputs:
                recorder.answered(o.request_id for one in outputs.values() for o in one.outputs if o.new_token_ids)
            return outputs, executed

        return run

    for name in ("step", "step_with_batch_queue"):
        setattr(EngineCore, name, recorded(getattr(EngineCore, name)))
    setattr(EngineCore, preprocess.__name__, preprocess_add_request)
    setattr(EngineCore, VARIABLE, True)


def _time_launches(executor: Any, recorder: Recorder) -> None:
    execute = executor.execute_model
    clock: Clock | None = None

    def execute_model(scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        nonlocal clock
        clock = clock or Clock()
        before = clock.now()
        result = execute(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            recorder.launched(scheduler_output, before, clock.now())
        return result

    executor.execute_model = execute_model


def _open(folder: Path) -> TextIO:
    """A file for this process's engine; its first line says which side it is."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"steps-{os.getpid()}.jsonl").open("w", encoding="utf-8")
    about = {
        "side": _side(os.environ),
        "cores": len(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    file.write(json.dumps(about) + "\n")
    return file


def _side(environment: Mapping[str, str]) -> str:
    """By what Ray sets for all that runs in a replica, and `up` for HAProxy."""
    if "RAY_JOB_ID" not in environment:
        return VLLM
    return HIGH_THROUGHPUT if environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else PLAIN


@dataclass
class Side:
    """What the engines of one side recorded."""

    about: list[Mapping[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def read(folder: Path) -> dict[str, Side]:
    """By side, in the order of their names. FileNotFoundError without a recording."""
    sides: dict[str, Side] = {}
    files = sorted(folder.glob("steps-*.jsonl"), key=lambda file: int(re.sub(r"\D", "", file.stem)))
    for file in files:
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        about = json.loads(first)
        side = sides.setdefault(about["side"], Side())
        side.about.append(about)
        side.steps += [Step(**json.loads(line)) for line in lines]
    if not sides:
        raise FileNotFoundError(f"{folder}: no steps-*.jsonl there; did an engine record?")
    return dict(sorted(sides.items(), reverse=True))


def figures(steps: list[Step]) -> dict[str, str]:
    """Of some steps: medians, 10th and 90th percentiles."""

    def spread(values: Iterable[float]) -> str:
        found = sorted(values)
        return "{1:.2f} ({0:.2f} to {2:.2f})".format(*(percentile(found, p) for p in (10, 50, 90))) if found else ""

    others = [s.launch_ms - s.cpu_ms - s.queued_ms for s in steps]
    return {
        "steps": str(len(steps)),
        "tokens a step": f"{median(s.tokens for s in steps):.0f}" if steps else "",
        "arrival to launch": spread(s.waited_ms for s in steps if s.waited_ms is not None),
        "launch": spread(s.launch_ms for s in steps),
        "CPU time of it": spread(s.cpu_ms for s in steps),
        "waiting for a core": spread(s.queued_ms for s in steps),
        "else (asleep)": spread(others),
        "preempted, a step": f"{mean(s.preempted for s in steps):.2f}" if steps else "",
        "launch to first token": spread(
            s.first_token_ms - s.waited_ms - s.launch_ms
            for s in steps
            if s.first_token_ms is not None and s.waited_ms is not None
        ),
        "arrival to first token": spread(s.first_token_ms for s in steps if s.first_token_ms is not None),
    }


KINDS: dict[str, Callable[[Step], bool]] = {
    "a prompt alone": lambda step: step.alone,
    "several prompts alone": lambda step: step.new == step.requests > 1,
    "prompts beside answers": lambda step: 0 < step.new < step.requests,
    "one answer": lambda step: step.requests == 1 and not step.new,
    "several answers": lambda step: step.requests > 1 and not step.new,
}


def table(kind: str, steps: Mapping[str, list[Step]]) -> Table:
    """The steps of a kind, a column a side."""
    shape = Table(title=f"{kind}: ms, median (10th to 90th percentile)", title_justify="left")
    shape.add_column("")
    for side in steps:
        shape.add_column(side, justify="right")
    columns = [figures(of_side) for of_side in steps.values()]
    for row in columns[0]:
        shape.add_row(row, *(column[row] for column in columns))
    return shape


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        show(Path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(str(error))


def show(folder: Path) -> None:
    """Print what is recorded in `folder`. FileNotFoundError without a recording."""
    sides = read(folder)
    console = Console(width=None if sys.stdout.isatty() else 240)
    for kind, belongs in KINDS.items():
        chosen = {name: [step for step in side.steps if belongs(step)] for name, side in sides.items()}
        if any(chosen.values()):
            console.print(table(kind, chosen))
    for side in sides.values():
        for about in side.about:
            console.print(str(about), markup=False, highlight=False)


if __name__ == "__main__":
    main()
