"""All that is measured on GPUs, in the time there is.

    python -m benchmarks.gpu_session --out FOLDER --minutes 28 --data PROMPTS [--steps adaptive,serve] [--gpus 0,1]

Each step is a command of its own on one GPU, with Gemma-4-31B's shape, dummy weights and forced acceptance, and leaves
what it found in FOLDER/STEP as it goes; a step that would not end in time is not begun. With several GPUs each takes
the next step as it gets free. Works from a checkout that is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from benchmarks.gemma4_gpu import ROOT, first_gpu
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

    def step(name: str, seconds: int, *arguments: str) -> Step:
        return Step(name, (*arguments, "--out", str(out / name)), seconds)

    return [
        step("adaptive", 740, "benchmarks.adaptive_gpu", "--tasks", "mt_bench,gsm8k", "--seconds", "5"),
        step("speed", 1000, "benchmarks.gemma4_bench", "speed", "--tasks", "mt_bench", *prompts),
        step("overhead", 920, "benchmarks.gemma4_bench", "overhead", "--engine-steps"),
        step("serve", 410, "benchmarks.gemma4_gpu", "--part", "serve"),
        step("engine", 230, "benchmarks.gemma4_gpu", "--part", "engine"),
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


def environment(out: Path, gpu: str) -> dict[str, str]:
    """What a step on that GPU has besides our own: caches that no other step writes to, kept for the next one on it."""
    cache = out / f"cache-{gpu}"
    return {
        "CUDA_VISIBLE_DEVICES": gpu,
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


def run(command: Sequence[str], log: BinaryIO, seconds: float, variables: Mapping[str, str] | None = None) -> str:
    """Run it, and end it and all that it started when its time is up. How it ended."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | dict(variables or {}), stdout=log, stderr=subprocess.STDOUT
    )
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


def work_through(todo: Sequence[Step], gpus: Sequence[str], out: Path, seconds: float) -> None:
    """Each GPU takes the next step until none is left or none would end in time. An interrupt begins no further one."""
    ends = time.monotonic() + seconds
    waiting, lock, stopped = list(todo), threading.Lock(), threading.Event()

    def work(gpu: str) -> None:
        while not stopped.is_set():
            with lock:
                if not waiting:
                    return
                step = waiting.pop(0)
            left = ends - time.monotonic()
            if not may_begin(step, left):
                print(f"{step.name}: left out, {left:.0f} s are too few", flush=True)
                continue
            (out / step.name).mkdir(exist_ok=True)
            print(f"{step.name}: begun on GPU {gpu}, {left:.0f} s left; log {out / step.name}.log", flush=True)
            began, limit = time.monotonic(), min(left, LONGEST_SHARE * step.seconds)
            with (out / f"{step.name}.log").open("wb") as log:
                how = run([sys.executable, "-m", *step.arguments], log, limit, environment(out, gpu))
            print(f"{step.name}: {how} after {time.monotonic() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(len(gpus)) as pool:
        workers = [pool.submit(work, gpu) for gpu in gpus]
        try:
            for worker in workers:
                worker.result()
        finally:
            stopped.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--data", type=Path, help="folder of <task>.jsonl (default: the hub)")
    parser.add_argument("--steps", help="which, in which order (default: all)")
    parser.add_argument("--gpus", default=first_gpu(), help="CUDA devices (default: the first there is)")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        todo = chosen(steps(out, options.data.resolve() if options.data else None), options.steps)
    except ValueError as error:
        parser.error(str(error))
    work_through(todo, options.gpus.split(","), out, 60 * options.minutes)


if __name__ == "__main__":
    main()
