"""How many replicas a load takes, from measured step times: `python -m benchmarks.capacity > docs/capacity.md`.

A replica that runs B requests gives B x acceptance length / step time tokens a second.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflash_serve.hardware import Cluster
from dflash_serve.settings import resolve

STEP_TIMES = Path(__file__).parent / "surfaces" / "gemma4-31b-h200.json"
PROFILE = "gemma4-31b-h200"
PUBLISHED_ACCEPTANCE = {"MT-Bench (chat)": 4.19, "GSM8K": 7.52, "Math500": 8.62}
"""Acceptance lengths of z-lab/gemma-4-31B-it-DFlash, 15 draft tokens, 32 requests, from its model card: measured by
its authors on a B300, not by us."""
REQUESTS_A_SECOND = (1, 2, 5, 10)
TOKENS_A_REQUEST = (256, 1024, 4096)
SIZED_FOR = "MT-Bench (chat)"

HEAD = """# Capacity of a Gemma-4-31B replica on one H200

<!-- Made by `python -m benchmarks.capacity > docs/capacity.md`; a test compares. -->

Computed, not run: step times were measured on one H200 (Gemma-4-31B's shape with dummy weights, prompts of 128 tokens,
`benchmarks/surfaces/gemma4-31b-h200.json`), acceptance lengths are those that the drafter's card gives for a B300. With
stock vLLM 0.29 the Gemma-4 drafter accepts less: see README.md. Left out: prefill (long prompts take GPU time of their
own), the network, and what queues cost. Measure your own traffic before you buy: `ray_dflash_acceptance_length` is the
number to put in. Between measured batch sizes, step times are taken to grow linearly.
"""


def step_seconds(rows: list[dict[str, Any]], requests: float) -> float:
    """Step time at `requests` running requests, linear between measured ones.

    Args:
        rows: `{"B": requests, "step_ms": milliseconds}`, ascending.

    Raises ValueError outside of what was measured.
    """
    for low, high in itertools.pairwise(rows):
        if low["B"] <= requests <= high["B"]:
            share = (requests - low["B"]) / (high["B"] - low["B"])
            milliseconds: float = low["step_ms"] + share * (high["step_ms"] - low["step_ms"])
            return milliseconds / 1000
    raise ValueError(f"{requests} requests: measured were {rows[0]['B']} to {rows[-1]['B']}")


def tokens_per_second(rows: list[dict[str, Any]], requests: float, acceptance_length: float) -> float:
    """Of one replica."""
    return requests * acceptance_length / step_seconds(rows, requests)


def replicas(requests_per_second: float, tokens_per_request: float, replica_tokens_per_second: float) -> int:
    """Replicas that give the load's tokens."""
    return math.ceil(requests_per_second * tokens_per_request / replica_tokens_per_second)


def gpu_hours_per_million_tokens(replica_tokens_per_second: float) -> float:
    """With one GPU a replica that is always busy."""
    return 1e6 / replica_tokens_per_second / 3600


def report() -> str:
    """docs/capacity.md."""
    measured = json.loads(STEP_TIMES.read_text())
    settings = resolve({"profile": PROFILE}, Cluster(cpus=0, gpus={})).settings
    drafted = [row for row in measured["dflash"] if row["K"] == settings.speculation.num_draft_tokens]
    target = settings.autoscaling.target_ongoing_requests
    return "\n".join([HEAD, *_replica(measured["ar"], drafted, target), "", *_fleet(drafted, target)]) + "\n"


def _replica(plain: list[dict[str, Any]], drafted: list[dict[str, Any]], target: float) -> Iterator[str]:
    sizes = (8, round(target), 32)
    yield "## One replica: tokens/s\n"
    yield f"At 8 requests, at {target:g} (`autoscaling.target_ongoing_requests` of the profile) and at 32.\n"
    columns = ["text", "acceptance length", *(f"{size} requests" for size in sizes), "GPU hours a million tokens"]
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|" + "---|" * (len(sizes) + 1)
    for text, length, rows in (
        ("any, no drafter", 1.0, plain),
        *((text, length, drafted) for text, length in PUBLISHED_ACCEPTANCE.items()),
    ):
        speeds = [tokens_per_second(rows, size, length) for size in sizes]
        cost = gpu_hours_per_million_tokens(speeds[1])
        yield f"| {text} | {length:g} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} | {cost:.2f} |"
    yield f"\nGPU hours: at {target:g} requests, always busy. Times what an hour of your GPU costs, that is the price."


def _fleet(drafted: list[dict[str, Any]], target: float) -> Iterator[str]:
    length = PUBLISHED_ACCEPTANCE[SIZED_FOR]
    speed = tokens_per_second(drafted, target, length)
    yield "## Replicas for a load\n"
    yield f"For {SIZED_FOR} (acceptance length {length:g}), each replica at {target:g} requests: {speed:,.0f} tokens/s."
    yield "No spare is in it: add one for a lost node, and one for updates (`autoscaling.max_surge_percent`).\n"
    yield f"| requests/s | {' | '.join(f'{tokens:,} tokens each' for tokens in TOKENS_A_REQUEST)} |"
    yield "|---|" + "---|" * len(TOKENS_A_REQUEST)
    for rate in REQUESTS_A_SECOND:
        yield f"| {rate} | {' | '.join(str(replicas(rate, tokens, speed)) for tokens in TOKENS_A_REQUEST)} |"


if __name__ == "__main__":
    print(report(), end="")
