"""Where the time from a request's arrival in vLLM's engine to its first token goes, step by step, on any side.

    python -m benchmarks.engine_steps FOLDER

With `--engine-steps`, `benchmarks.gemma4_bench overhead` and `benchmarks.front_end_paced` have the engine of each side
record its steps into FOLDER (`install`); this prints what they took. A prompt that is read alone is launched by the CPU
while nothing else keeps the GPU busy, so what the CPU loses there is added to the TTFT.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from dflash_serve.bench.overhead import HIGH_THROUGHPUT, PLAIN, SIDES, VLLM
from dflash_serve.bench.summary import percentile

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

VARIABLE = "DFLASH_ENGINE_STEPS"
"""Of the environment: the folder into which an engine records."""
ENGINE = {"worker_extension_cls": "benchmarks.engine_recorder.Extension"}
"""Engine settings with which an engine records, if it runs the model in its own process."""
FILES = "steps-*.jsonl"


@dataclass(frozen=True)
class Moment:
    """Of a thread. Seconds."""

    at: float
    cpu: float
    queued: float
    """Ready to run, but another thread had the core; NaN where Linux does not count it."""
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
        """Linux's, nanoseconds in the second field."""
        if self._scheduling < 0:
            return float("nan")
        return int(os.pread(self._scheduling, 64, 0).split()[1]) / 1e9


@dataclass(frozen=True)
class Span:
    """What a thread did in a time. Milliseconds."""

    took_ms: float
    cpu_ms: float
    queued_ms: float
    preempted: int

    @classmethod
    def of(cls, before: Moment, after: Moment) -> Span:
        return cls(
            1000 * (after.at - before.at),
            1000 * (after.cpu - before.cpu),
            1000 * (after.queued - before.queued),
            after.preempted - before.preempted,
        )

    @property
    def asleep_ms(self) -> float:
        """Neither running nor ready to."""
        return self.took_ms - self.cpu_ms - self.queued_ms


@dataclass
class Step:
    """One pass of the model. Times in milliseconds."""

    requests: int
    new: int
    """Requests of it whose prompts it begins to read."""
    tokens: int
    launch: Span
    """The model's call: with a GPU, until all of it but the sampling is handed over."""
    waited_ms: float | None = None
    """From the first new request's arrival in the engine's process to the launch; None without a new one."""
    answer: Span | None = None
    """From there to the first token of one: the sampling, the next step's launch where several are under way at once,
    and the device's time. None without a new request."""

    @property
    def first_token_ms(self) -> float | None:
        """From the first arrival."""
        if self.waited_ms is None or self.answer is None:
            return None
        return self.waited_ms + self.launch.took_ms + self.answer.took_ms

    @classmethod
    def from_json(cls, line: str) -> Step:
        values = json.loads(line)
        launch, answer = values.pop("launch"), values.pop("answer")
        return cls(**values, launch=Span(**launch), answer=answer and Span(**answer))


class Recorder:
    """The engine's thread calls all but `arrived`."""

    def __init__(self, file: TextIO, now: Callable[[], Moment] | None = None) -> None:
        self._file = file
        self._now = now
        self._arrivals: dict[str, float] = {}
        self._unanswered: dict[str, tuple[Step, Moment]] = {}

    def now(self) -> Moment:
        """Of the engine's thread."""
        if self._now is None:
            self._now = Clock().now
        return self._now()

    def arrived(self, request_id: str, at: float) -> None:
        """The thread that reads requests from the front end has one, since `at`."""
        self._arrivals[request_id] = at

    def launched(self, scheduled: SchedulerOutput, before: Moment, after: Moment) -> None:
        """A step's model was called, from `before` to `after`."""
        for request in scheduled.finished_req_ids:
            self._arrivals.pop(request, None)
            self._unanswered.pop(request, None)
        if not scheduled.total_num_scheduled_tokens:
            return
        # one that comes again, having been preempted, is not new: its arrival is gone
        new = [request.req_id for request in scheduled.scheduled_new_reqs if request.req_id in self._arrivals]
        step = Step(
            requests=len(scheduled.num_scheduled_tokens),
            new=len(new),
            tokens=scheduled.total_num_scheduled_tokens,
            launch=Span.of(before, after),
        )
        if new:
            step.waited_ms = 1000 * (before.at - min(self._arrivals.pop(request) for request in new))
            self._unanswered |= dict.fromkeys(new, (step, after))
        else:
            self._write(step)

    def answered(self, request_ids: Iterable[str]) -> None:
        """The engine has tokens of these requests."""
        for request in self._unanswered.keys() & set(request_ids):
            step, launched = self._unanswered.pop(request)
            if step.answer is None:
                step.answer = Span.of(launched, self.now())
                self._write(step)

    def _write(self, step: Step) -> None:
        self._file.write(json.dumps(asdict(step)) + "\n")
        if step.new:
            self._file.flush()


def prepare(folder: Path) -> None:
    """Make the folder, and take away what an earlier run recorded there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(FILES):
        file.unlink()


def install(folder: Path) -> None:
    """Have the engine of this process record its steps into `folder`, which is there; nothing is written where none
    runs."""
    from vllm.v1.engine.core import EngineCore

    recorder: Recorder | None = None
    preprocess = EngineCore.preprocess_add_request

    def preprocess_add_request(self: EngineCore, request: Any) -> Any:
        nonlocal recorder
        at = time.perf_counter()
        result = preprocess(self, request)
        if recorder is None:
            recorder = Recorder(_open(folder))
            _time_launches(self.model_executor, recorder)
        recorder.arrived(request.request_id, at)
        return result

    def recorded(step: Callable[[EngineCore], Any]) -> Callable[[EngineCore], Any]:
        def run(self: EngineCore) -> Any:
            outputs, executed = step(self)
            if recorder is not None and outputs:
                recorder.answered(o.request_id for one in outputs.values() for o in one.outputs if o.new_token_ids)
            return outputs, executed

        return run

    for name in ("step", "step_with_batch_queue"):
        setattr(EngineCore, name, recorded(getattr(EngineCore, name)))
    setattr(EngineCore, "preprocess_add_request", preprocess_add_request)  # noqa: B010  mypy: a method


def _time_launches(executor: Any, recorder: Recorder) -> None:
    execute = executor.execute_model

    def execute_model(scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        before = recorder.now()
        result = execute(scheduler_output, *args, **kwargs)
        recorder.launched(scheduler_output, before, recorder.now())
        return result

    executor.execute_model = execute_model


def _open(folder: Path) -> TextIO:
    """A file for this process's engine; its first line says which side it is."""
    file = (folder / FILES.replace("*", str(os.getpid()))).open("w", encoding="utf-8")
    about = {
        "side": _side(os.environ),
        "cores": len(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    file.write(json.dumps(about) + "\n")
    file.flush()
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
    """By side, in the order of SIDES. FileNotFoundError without a recording."""
    sides: dict[str, Side] = {}
    for file in sorted(folder.glob(FILES)):
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        about = json.loads(first)
        side = sides.setdefault(about["side"], Side())
        side.about.append(about)
        side.steps += map(Step.from_json, lines)
    if not sides:
        raise FileNotFoundError(f"{folder}: no {FILES} there; an engine records that has its model in its own process")
    return {name: sides[name] for name in SIDES.values() if name in sides}


def figures(steps: list[Step]) -> dict[str, str]:
    """Of some steps: medians, 10th and 90th percentiles."""

    def spread(values: Iterable[float]) -> str:
        found = sorted(values)
        if not found or any(value != value for value in found):
            return ""
        return "{1:.2f} ({0:.2f} to {2:.2f})".format(*(percentile(found, p) for p in (10, 50, 90)))

    launches = [step.launch for step in steps]
    answers = [step.answer for step in steps if step.answer is not None]
    return {
        "steps": str(len(steps)),
        "tokens a step": f"{median(s.tokens for s in steps):.0f}" if steps else "",
        "arrival to launch": spread(s.waited_ms for s in steps if s.waited_ms is not None),
        "launch": spread(span.took_ms for span in launches),
        "  running": spread(span.cpu_ms for span in launches),
        "  waiting for a core": spread(span.queued_ms for span in launches),
        "  asleep": spread(span.asleep_ms for span in launches),
        "  preempted, a step": f"{mean(span.preempted for span in launches):.2f}" if steps else "",
        "launch to first token": spread(span.took_ms for span in answers),
        "  running ": spread(span.cpu_ms for span in answers),
        "  waiting for a core ": spread(span.queued_ms for span in answers),
        "arrival to first token": spread(s.first_token_ms for s in steps if s.first_token_ms is not None),
    }


KINDS: dict[str, Callable[[Step], bool]] = {
    "a prompt alone": lambda step: step.new == step.requests == 1,
    "several prompts alone": lambda step: step.new == step.requests > 1,
    "prompts beside others": lambda step: 0 < step.new < step.requests,
    "one token": lambda step: not step.new and step.tokens == 1,
    "a token each": lambda step: not step.new and step.tokens == step.requests > 1,
    "drafts, or what is left of prompts": lambda step: not step.new and step.tokens > step.requests,
}


def table(kind: str, steps: Mapping[str, list[Step]]) -> Table:
    """The steps of a kind, a column a side."""
    shape = Table(title=f"{kind}: ms, median (10th to 90th percentile)", title_justify="left")
    shape.add_column("")
    for side in steps:
        shape.add_column(side, justify="right")
    columns = [figures(of_side) for of_side in steps.values()]
    for row in columns[0]:
        if any(column[row] for column in columns):
            shape.add_row(row, *(column[row] for column in columns))
    return shape


def show(folder: Path) -> bool:
    """Print what is recorded in `folder`, or that nothing is; whether something is."""
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    try:
        sides = read(folder)
    except FileNotFoundError as error:
        console.print(str(error), markup=False)
        return False
    for kind, belongs in KINDS.items():
        chosen = {name: [step for step in side.steps if belongs(step)] for name, side in sides.items()}
        if any(chosen.values()):
            console.print(table(kind, chosen))
    for side in sides.values():
        for about in side.about:
            console.print(str(about), markup=False)
    return True


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if not show(Path(sys.argv[1])):
        sys.exit(1)


if __name__ == "__main__":
    main()
