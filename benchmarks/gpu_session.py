"""All that is measured on one GPU, in the time there is.

    python -m benchmarks.gpu_session --out FOLDER --minutes 28 --data PROMPTS [--steps adaptive,serve]

Each step is a command of its own, with Gemma-4-31B's shape, dummy weights and forced acceptance, and leaves what it
found in FOLDER as it goes; a step that would not end in time is not begun. Works from a checkout that is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from benchmarks.gemma4_gpu import ROOT
from dflash_serve.bench.servers import family

STOP_SECONDS = 30
SHORTEST_SHARE = 0.9
"""Of a step's usual time, that must be left for it to be begun."""
LONGEST_SHARE = 1.5
"""Of a step's usual time, after which it is ended."""


@dataclass(frozen=True)
class Step:
    """A command and what it takes on one H200, in seconds: the first start of a pair compiles, later ones less."""

    name: str
    arguments: tuple[str, ...]
    seconds: int


def steps(out: Path, data: Path | None) -> list[Step]:
    """What is to be known first comes first."""
    prompts = ("--data", str(data)) if data else ()
    to = ("--out", str(out))
    return [
        Step("adaptive", ("benchmarks.adaptive_gpu", *to, "--tasks", "mt_bench,gsm8k", "--seconds", "3.5"), 760),
        Step("serve", ("benchmarks.gemma4_gpu", *to, "--part", "serve"), 420),
        Step("overhead", ("benchmarks.gemma4_bench", "overhead", *to, "--fronts", "vllm,up"), 480),
        Step("speed", ("benchmarks.gemma4_bench", "speed", *to, "--tasks", "mt_bench", *prompts), 800),
        Step("engine", ("benchmarks.gemma4_gpu", *to, "--part", "engine"), 330),
    ]


def chosen(every: Sequence[Step], names: str | None) -> list[Step]:
    """Those named, in the order named. ValueError for an unknown name."""
    if names is None:
        return list(every)
    known = {step.name: step for step in every}
    wrong = [name for name in names.split(",") if name not in known]
    if wrong:
        raise ValueError(f"--steps: no step {wrong[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def may_begin(step: Step, seconds_left: float) -> bool:
    """Whether it is worth beginning."""
    return seconds_left >= SHORTEST_SHARE * step.seconds


def run(command: Sequence[str], log: BinaryIO, seconds: float) -> str:
    """Run it, and end it and all that it started when its time is up. How it ended."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f"ended with {process.wait(seconds)}"
    # servers are in sessions of their own, so by descent, noted before their parents are gone
    members = family(process.pid)
    for member in reversed(members):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, left = psutil.wait_procs(members, STOP_SECONDS)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    return "out of time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--data", type=Path, help="folder of <task>.jsonl (default: the hub)")
    parser.add_argument("--steps", help="which, in which order (default: all)")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        todo = chosen(steps(out, options.data.resolve() if options.data else None), options.steps)
    except ValueError as error:
        parser.error(str(error))
    ends = time.monotonic() + 60 * options.minutes
    for step in todo:
        left = ends - time.monotonic()
        if not may_begin(step, left):
            print(f"{step.name}: left out, {left:.0f} s are too few", flush=True)
            continue
        print(f"{step.name}: begun, {left:.0f} s left; log {out / step.name}.log", flush=True)
        began = time.monotonic()
        with (out / f"{step.name}.log").open("wb") as log:
            how = run([sys.executable, "-m", *step.arguments], log, min(left, LONGEST_SHARE * step.seconds))
        print(f"{step.name}: {how} after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
