"""A load test of changing shape, and the dashboards drawn from what Prometheus saw of it: docs/dashboards/*.png.

    python -m benchmarks.dashboard_preview

Each task of the prompts is a traffic class, so that acceptance by task shows. The load climbs until the first replica
is full: a second one starts, and some requests are shed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import Progress

from benchmarks.local_server import MODEL, ROOT, Server, metrics_discovery, serving
from dflash_serve.monitoring import preview
from dflash_serve.monitoring.prometheus import running

PHASES = ((1, 0.2), (4, 0.3), (11, 0.3), (2, 0.2))
"""(requests at once, share of the time)"""
SYSTEM = " ".join(
    [
        "You are a helpful assistant for a small company.",
        "Answer in plain words and keep to the question.",
        "When you are asked for code, give the code first and then one sentence about it.",
        "When you are asked to reason, number your steps and put the result on a line of its own.",
        "When a question cannot be answered from what you were told, say so and say what is missing.",
        "Do not repeat the question, do not apologise, and do not mention these instructions.",
        "Use short sentences, common words and the units that the question uses.",
        "If a list is asked for, use one line for each item and no more than ten items.",
        "If a table is asked for, use as few columns as will do.",
        "When the question is in another language than English, answer in that language, and keep names as they are.",
        "When you give a number, say what it counts and how sure you are of it, and round it as careful people do.",
        "Before you answer, think of the one thing that the reader wants to know most, and put that on the first line.",
        "If something could do harm, say so in one sentence, and then help as far as you can.",
        "Money is in euros, dates are written day, month, year, and times are in the 24-hour clock.",
    ]
)
"""More than two blocks of the KV cache (128 tokens on CPU), as a product's instructions are: there is something
to find in the prefix cache."""


def prompts() -> list[tuple[str, str]]:
    """(task, prompt), the tasks taking turns."""
    lines = (ROOT / "dflash_serve" / "bench" / "prompts.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    by_task: dict[str, list[str]] = {}
    for item in map(json.loads, lines):
        by_task.setdefault(item["task"], []).append(item["prompt"])
    turns = itertools.zip_longest(*([(task, prompt) for prompt in many] for task, many in by_task.items()))
    return [pair for turn in turns for pair in turn if pair is not None]


async def load(server: Server, seconds: float, progress: Progress) -> None:
    bar = progress.add_task("", total=seconds)
    queue = itertools.cycle(prompts())
    client = server.async_client()
    started = time.monotonic()

    async def worker(until: float) -> None:
        while time.monotonic() < until:
            task, prompt = next(queue)
            options: dict[str, Any] = {
                "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
                "max_tokens": 96,
                "temperature": 0,
                "extra_headers": {"x-dflash-traffic-class": task},
            }
            try:
                async for _ in await client.chat.completions.create(model=MODEL, stream=True, **options):
                    pass
            except openai.RateLimitError:
                await asyncio.sleep(2)

    for width, share in PHASES:
        until = time.monotonic() + share * seconds
        workers = asyncio.gather(*(worker(until) for _ in range(width)))
        while not workers.done():
            await asyncio.sleep(1)
            progress.update(bar, completed=time.monotonic() - started, description=f"{width} at once")
        await workers
    await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=270)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboards")
    options = parser.parse_args()
    console = Console()
    args = {
        "metrics": {"traffic_classes": sorted({task for task, _ in prompts()})},
        "limits": {"max_concurrent_requests": 8},
        "autoscaling": {"max_replicas": 2, "target_ongoing_requests": 5, "upscale_delay_s": 5, "downscale_delay_s": 60},
    }
    with (
        tempfile.TemporaryDirectory() as name,
        console.status("starting a server"),
        serving(Path(name), args) as server,
        running(Path(name, "prometheus"), [metrics_discovery(server)]) as prometheus,
    ):
        start = time.time()
        with Progress(console=Console(stderr=True)) as progress:
            asyncio.run(load(server, options.seconds, progress))
        preview.save(prometheus, start, time.time(), options.out)


if __name__ == "__main__":
    main()
