"""Whether this machine does the same work in the same time, alone and beside a server.

    python -m benchmarks.host_speed [--seconds 60] [--beside PID]

Some 40 ms of one thread's CPU time, again and again, with pauses, as an engine reads a prompt now and then. Where a
host shares its cores with others the same work has two speeds, for seconds at a time, and latencies of tens of
milliseconds are to be compared over many alternations only. `--beside`: every second few seconds all processes of that
server, which nobody must be using, are suspended: what is the host's stays, what is the server's goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import psutil
import typer
from rich.progress import track

from benchmarks.pace import keep_busy
from dflash_serve.bench.servers import family
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

    def add(self, count: int) -> None:
        """So many more, with a pause before each."""
        for _ in range(count):
            time.sleep(PAUSE_SECONDS)
            began, used = time.perf_counter(), time.thread_time()
            keep_busy()
            self.wall.append(1000 * (time.perf_counter() - began))
            self.cpu.append(1000 * (time.thread_time() - used))

    def __str__(self) -> str:
        wall, cpu = sorted(self.wall), sorted(self.cpu)
        fast = percentile(wall, 10)
        slow = sum(one > SLOW * fast for one in wall) / len(wall)
        return (
            f"{len(wall)} times, ms: 10th percentile {fast:.1f}, median {percentile(wall, 50):.1f}, 90th "
            f"{percentile(wall, 90):.1f}, largest {wall[-1]:.1f}; CPU time: median {percentile(cpu, 50):.1f}, 90th "
            f"{percentile(cpu, 90):.1f}; {slow:.0%} took more than {SLOW} times the 10th percentile"
        )


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """The server of this process id and all that belongs to it, for as long as the block takes."""
    stopped: list[psutil.Process] = []
    try:
        for process in family(pid):
            with contextlib.suppress(psutil.Error):
                process.suspend()
                stopped.append(process)
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()


def main(
    seconds: Annotated[float, typer.Option(help="How long to look; twice that with --beside.")] = 60.0,
    beside: Annotated[int | None, typer.Option(help="Process id of a server that is suspended in turn.")] = None,
) -> None:
    """Do the same work again and again, and say how long it took."""
    import torch

    torch.set_num_threads(1)
    if beside is not None and not psutil.pid_exists(beside):
        raise typer.BadParameter(f"--beside: no process {beside}")
    keep_busy()
    turns = max(1, round(seconds / IN_TURN / (PAUSE_SECONDS + 0.04)))
    beside_it, alone = Repetitions(), Repetitions()
    for turn in track(range(turns if beside is None else 2 * turns), description="the same work"):
        if beside is not None and turn % 2 == 0:
            beside_it.add(IN_TURN)
            continue
        with contextlib.nullcontext() if beside is None else suspended(beside):
            alone.add(IN_TURN)
    if beside is None:
        print(alone)
    else:
        print(f"beside it: {beside_it}\nsuspended: {alone}")


if __name__ == "__main__":
    typer.run(main)
