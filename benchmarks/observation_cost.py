"""What observation costs: tokens/s with everything on against everything off, both servers up, in alternating rounds.

    python -m benchmarks.observation_cost

On: our metrics and vLLM's with traffic classes, a Prometheus that scrapes them and evaluates the rules, the access log,
per-request acceptance, and a trace of each request to a collector. Off: none of it (benchmarks/unobserved.py). Rounds
go on, off, off, on, …, so that a drift of the machine weighs on both alike. Beside the speed stands the CPU time of
the server's processes for a token, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.progress import Progress

from benchmarks.collector import Collector
from benchmarks.local_server import MODEL, ROOT, Server, metrics_discovery, serving
from dflash_serve.monitoring.prometheus import running

ON, OFF = "on", "off"
PROMPT = "Count from 1 to 100."
CLASSES = ("chat", "batch")


@contextlib.contextmanager
def observed(folder: Path) -> Iterator[tuple[Server, Collector]]:
    collector = Collector()
    args = {"metrics": {"traffic_classes": list(CLASSES), "otlp_traces_endpoint": collector.endpoint}}
    with serving(folder, args) as server, running(folder / "prometheus", [metrics_discovery(server)]):
        yield server, collector
    collector.close()


@contextlib.contextmanager
def unobserved(folder: Path) -> Iterator[Server]:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["import_path"] = "benchmarks.unobserved:build"
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(config))
    with serving(folder, {}, base=base, environment={"PYTHONPATH": str(ROOT)}) as server:
        yield server


def cpu_seconds(server: Server) -> float:
    """CPU time that the server's processes, Ray's among them, have used so far."""
    top = psutil.Process(server.process.pid)
    total = 0.0
    for process in (top, *top.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            total += used.user + used.system
    return total


async def tokens_per_second(server: Server, concurrency: int, requests: int, max_tokens: int) -> float:
    """Throughput of `requests` greedy streams of exactly `max_tokens`, `concurrency` at a time."""
    room = asyncio.Semaphore(concurrency)
    async with server.async_client() as client:

        async def ask(number: int) -> None:
            async with room:
                stream = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": PROMPT}],
                    temperature=0,
                    max_tokens=max_tokens,
                    stream=True,
                    extra_body={"ignore_eos": True},
                    extra_headers={"x-dflash-traffic-class": CLASSES[number % 2]},
                )
                async for _ in stream:
                    pass

        began = time.perf_counter()
        await asyncio.gather(*map(ask, range(requests)))
        return requests * max_tokens / (time.perf_counter() - began)


def ratio(rounds: dict[str, list[float]]) -> list[float]:
    """On over off, the geometric mean over pairs of rounds, and where 95 % of its bootstrap lies."""
    logs = [math.log(on / off) for on, off in zip(rounds[ON], rounds[OFF], strict=True)]
    chance = random.Random(0)
    drawn = sorted(statistics.mean(chance.choices(logs, k=len(logs))) for _ in range(4000))
    return [round(math.exp(value), 4) for value in (statistics.mean(logs), drawn[100], drawn[-101])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds of each side (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=4, help="requests of a round (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "observation-cost-cpu.json")
    options = parser.parse_args()
    console = Console()
    speeds: dict[str, list[float]] = {ON: [], OFF: []}
    costs: dict[str, list[float]] = {ON: [], OFF: []}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack, Progress(console=console) as progress:
        bar = progress.add_task("starting both servers", total=2 * options.rounds + 2)
        for side in (ON, OFF):
            Path(name, side).mkdir()
        server, collector = stack.enter_context(observed(Path(name, ON)))
        servers = {ON: server, OFF: stack.enter_context(unobserved(Path(name, OFF)))}
        for number in range(options.rounds + 1):
            for side in (ON, OFF) if number % 2 else (OFF, ON):
                progress.update(bar, description=f"round {number} of {options.rounds}, {side}")
                used = cpu_seconds(servers[side])
                speed = asyncio.run(
                    tokens_per_second(servers[side], options.concurrency, options.requests, options.max_tokens)
                )
                if number:  # the first warms up
                    speeds[side].append(round(speed, 2))
                    used = cpu_seconds(servers[side]) - used
                    costs[side].append(round(1000 * used / (options.requests * options.max_tokens), 3))
                progress.update(bar, advance=1)
        spans = len(collector.spans)
    if not spans:
        raise SystemExit("no span reached the collector: observation was not on")
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "concurrency": options.concurrency,
        "requests_of_a_round": options.requests,
        "max_tokens": options.max_tokens,
        "spans": spans,
        "tokens_per_second_ratio": ratio(speeds),
        "cpu_milliseconds_per_token_ratio": ratio(costs),
        "mean_tokens_per_second": {side: round(statistics.mean(values), 2) for side, values in speeds.items()},
        "mean_cpu_milliseconds_per_token": {side: round(statistics.mean(values), 3) for side, values in costs.items()},
        "tokens_per_second": speeds,
        "cpu_milliseconds_per_token": costs,
    }
    options.out.write_text(json.dumps(result) + "\n")
    for name, values in (("tokens/s", ratio(speeds)), ("CPU time per token", ratio(costs))):
        console.print(f"{name}, on / off: {values[0]:.4f} (95 %: {values[1]:.4f} to {values[2]:.4f})")
    console.print(f"written: {options.out}")


if __name__ == "__main__":
    main()
