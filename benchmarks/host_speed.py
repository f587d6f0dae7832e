"""Whether this machine does the same work in the same time, alone and beside a server.

    python -m benchmarks.host_speed [--seconds 60] [--beside PID] [--out FILE]

Some 40 ms of one thread's CPU time, again and again, with pauses, as an engine reads a prompt now and then. Where a
host shares its cores with others the same work has two speeds, for seconds at a time, and latencies of tens of
milliseconds are to be compared over many alternations only. `--beside`: every second few seconds all processes of that
server, which nobody must be using, are suspended: what is the host's stays, what is the server's goes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.progress import track

from benchmarks.engine_steps import Clock, Span
from benchmarks.pace import keep_busy
from dflash_serve.bench.servers import suspended
from dflash_serve.bench.summary import percentile

PAUSE_SECONDS = 0.2
IN_TURN = 40
"""Repetitions until a server is suspended or goes on: some 10 s, which Ray's health checks bear."""
SLOW = 1.2
"""Times the 10th percentile: what takes longer was slowed."""


@dataclass
class Repetitions:
    """Milliseconds of each, by the clock and of the thread's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, count: int, clock: Clock) -> None:
        """So many more, with a pause before each."""
        for _ in range(count):
            time.sleep(PAUSE_SECONDS)
            before = clock.now()
            keep_busy()
            span = Span.of(before, clock.now())
            self.wall.append(span.took_ms)
            self.cpu.append(span.cpu_ms)

    def __str__(self) -> str:
        wall, cpu = sorted(self.wall), sorted(self.cpu)
        slow = SLOW * percentile(cpu, 10)
        slowed = [one for one in cpu if one > slow]
        runs = [len(list(group)) for over, group in itertools.groupby(self.cpu, lambda one: one > slow) if over]
        text = (
            f"{len(wall)} times, ms: 10th percentile {percentile(wall, 10):.1f}, median {percentile(wall, 50):.1f}, "
            f"90th {percentile(wall, 90):.1f}, largest {wall[-1]:.1f}; CPU time: 10th percentile "
            f"{percentile(cpu, 10):.1f}, median {percentile(cpu, 50):.1f}, 90th {percentile(cpu, 90):.1f}"
        )
        if slowed:
            text += (
                f"; {len(slowed) / len(cpu):.0%} took more than {SLOW} times the 10th percentile of the CPU time, on "
                f"median {percentile(slowed, 50):.1f}, at most {max(runs)} one after the other"
            )
        return text


def main(
    seconds: Annotated[float, typer.Option(help="How long to look; twice that with --beside.")] = 60.0,
    beside: Annotated[int | None, typer.Option(help="Process id of a server that is suspended in turn.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write each repetition's times there, as JSON.")] = None,
) -> None:
    """Do the same work again and again, and say how long it took."""
    import torch

    # so that a server goes on when this is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    torch.set_num_threads(1)
    if beside is not None and not psutil.pid_exists(beside):
        raise typer.BadParameter(f"--beside: no process {beside}")
    keep_busy()
    turns = max(1, round(seconds / IN_TURN / (PAUSE_SECONDS + 0.04)))
    clock, beside_it, alone = Clock(), Repetitions(), Repetitions()
    steal = psutil.cpu_times().steal
    every = range(turns if beside is None else 2 * turns)
    # drawn between turns alone: a thread of its own would run beside the work
    for turn in track(every, description="the same work", auto_refresh=False):
        if beside is not None and turn % 2 == 0:
            beside_it.add(IN_TURN, clock)
            continue
        with contextlib.nullcontext() if beside is None else suspended(beside):
            alone.add(IN_TURN, clock)
    print(alone if beside is None else f"beside it: {beside_it}\nsuspended: {alone}")
    print(f"taken by the hypervisor, as far as it says: {psutil.cpu_times().steal - steal:.2f} s of CPU time")
    if out is not None:
        out.write_text(json.dumps({"beside": asdict(beside_it), "alone": asdict(alone)}) + "\n")


if __name__ == "__main__":
    typer.run(main)
