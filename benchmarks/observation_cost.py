"""What observation costs: tokens/s with everything on against everything off, both servers up, in alternating rounds.

    python -m benchmarks.observation_cost

On: our metrics and vLLM's with traffic classes, a Prometheus that scrapes them and evaluates the rules, the access log,
per-request acceptance, and a trace of each request to a collector. Off: none of it (benchmarks/unobserved.py). Rounds
go on, off, off, on, …, so that a drift of the machine weighs on both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def ratio(rounds: dict[str, list[float]]) -> tuple[float, float, float]:
    """On over off: the median over pairs of rounds, and where 95 % of its bootstrap lies."""
    pairs = [on / off for on, off in zip(rounds[ON], rounds[OFF], strict=True)]
    chance = random.Random(0)
    drawn = sorted(statistics.median(chance.choices(pairs, k=len(pairs))) for _ in range(2000))
    return statistics.median(pairs), drawn[50], drawn[-51]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16, help="rounds of each side (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=8, help="requests of a round (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "observation-cost-cpu.json")
    options = parser.parse_args()
    console = Console()
    rounds: dict[str, list[float]] = {ON: [], OFF: []}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack, Progress(console=console) as progress:
        bar = progress.add_task("starting both servers", total=2 * options.rounds + 2)
        for side in (ON, OFF):
            Path(name, side).mkdir()
        server, collector = stack.enter_context(observed(Path(name, ON)))
        servers = {ON: server, OFF: stack.enter_context(unobserved(Path(name, OFF)))}
        for number in range(options.rounds + 1):
            for side in (ON, OFF) if number % 2 else (OFF, ON):
                progress.update(bar, description=f"round {number} of {options.rounds}, {side}")
                speed = asyncio.run(
                    tokens_per_second(servers[side], options.concurrency, options.requests, options.max_tokens)
                )
                if number:  # the first warms up
                    rounds[side].append(round(speed, 2))
                progress.update(bar, advance=1)
        spans = len(collector.spans)
    if not spans:
        raise SystemExit("no span reached the collector: observation was not on")
    middle, low, high = ratio(rounds)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "concurrency": options.concurrency,
        "requests_of_a_round": options.requests,
        "max_tokens": options.max_tokens,
        "spans": spans,
        "tokens_per_second": rounds,
        "median_tokens_per_second": {side: round(statistics.median(speeds), 2) for side, speeds in rounds.items()},
        "ratio": round(middle, 4),
        "ratio_95_percent": [round(low, 4), round(high, 4)],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(result)
    console.print(f"on / off = {middle:.4f} (95 %: {low:.4f} to {high:.4f}); written: {options.out}")


if __name__ == "__main__":
    main()
