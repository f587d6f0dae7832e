"""How many replicas a load takes, from measured throughput: `python -m benchmarks.capacity > docs/capacity.md`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from dflash_serve.bench.card import acceptance_length

MEASURED = Path(__file__).parent / "results" / "adaptive-h200" / "rows.jsonl"
"""One H200, 2026-11-26: the engine without HTTP (`python -m benchmarks.adaptive_gpu`)."""
TASKS = {"chat": "mt_bench", "maths": "gsm8k"}
TEXTS = {text: acceptance_length(task) for text, task in TASKS.items()}
"""Acceptance lengths with 15 draft tokens that the run was given: those of the drafter's card (B300)."""
AR, FIXED, ADAPTIVE = "AR", "K=15", "adaptive"
SIDES = {FIXED: "15 draft tokens", ADAPTIVE: "adaptive"}
LOADS = (8, 32, 64, 128)
SIZED_FOR, SIZED_AT = "chat", 32
REQUESTS_A_SECOND = (1, 2, 5, 10)
TOKENS_A_REQUEST = (256, 1024, 4096)
MADE = "one H200, dummy weights, synthetic acceptance"
"""Stands beside every number."""

Throughput = dict[tuple[str, str, int], float]
"""Tokens/s by side, text ("" where it does not matter) and requests."""

HEAD = f"""# Capacity of a Gemma-4-31B replica

<!-- Made by `python -m benchmarks.capacity > docs/capacity.md`; a test compares. -->

No number here comes from the real model: {MADE}.
Gemma-4-31B's shape and its drafter's with random values decoded answers of 256 tokens to prompts of 128, and each draft
position was accepted with the chance that gives the acceptance length of the drafter's card ({TEXTS["chat"]} chat,
{TEXTS["maths"]} maths; its authors measured them on a B300). B300s were not measured. Left out: long prompts (prefill
takes GPU time of its own), the KV cache's limit on long requests (`dflash-serve preflight` says how many fit), the HTTP
path, and what queues cost. Each figure is 5 seconds: neighbours differ by some percent from luck alone. Measure your
own traffic before you buy: `ray_dflash_acceptance_length` is the number to compare.
"""


def load(path: Path) -> Throughput:
    """Figures of a run, one JSON object a line."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = {task: text for text, task in TASKS.items()}
    return {
        (row["side"], texts.get(row["task"], ""), row["requests"]): row["tokens_per_second"]
        for row in rows
        if row.get("side") in (AR, FIXED, ADAPTIVE) and row.get("task") in ("", *texts)
    }


def replicas(requests_per_second: float, tokens_per_request: float, replica_tokens_per_second: float) -> int:
    """Replicas that give the load's tokens."""
    return math.ceil(requests_per_second * tokens_per_request / replica_tokens_per_second)


def gpu_hours_per_million_tokens(replica_tokens_per_second: float) -> float:
    """With one GPU a replica that is always busy."""
    return 1e6 / replica_tokens_per_second / 3600


def report() -> str:
    """docs/capacity.md."""
    measured = load(MEASURED)
    return "\n".join([HEAD, *_replica(measured), "", *_fleet(measured)]) + "\n"


def _replica(measured: Throughput) -> Iterator[str]:
    yield f"## One replica: tokens/s ({MADE})\n"
    loads = " | ".join(f"{load} requests" for load in LOADS)
    yield f"| text | speculation | {loads} | GPU hours a million tokens, at {SIZED_AT} requests |"
    yield "|---|---|" + "---|" * (len(LOADS) + 1)
    kinds = [("any", "", "none", AR)]
    kinds += [(f"{text} ({TEXTS[text]})", text, word, side) for text in TEXTS for side, word in SIDES.items()]
    for name, text, speculation, side in kinds:
        speeds = " | ".join(f"{measured[side, text, load]:,.0f}" for load in LOADS)
        hours = gpu_hours_per_million_tokens(measured[side, text, SIZED_AT])
        yield f"| {name} | {speculation} | {speeds} | {hours:.3f} |"
    yield "\nGPU hours, of a replica that is always busy, times what an hour of your GPU costs are the price."


def _fleet(measured: Throughput) -> Iterator[str]:
    fixed, adaptive = (measured[side, SIZED_FOR, SIZED_AT] for side in SIDES)
    yield f"## Replicas for a load (computed from {MADE})\n"
    yield f"For {SIZED_FOR}, {SIZED_AT} requests at a time in each replica: {fixed:,.0f} tokens/s with 15 draft tokens,"
    yield f"{adaptive:,.0f} adaptive. In each cell the replicas with 15 draft tokens, then with adaptive speculation."
    yield "No spare is in it: add one for a lost node, and one for updates (`autoscaling.max_surge_percent`).\n"
    yield f"| requests/s | {' | '.join(f'{tokens:,} tokens each' for tokens in TOKENS_A_REQUEST)} |"
    yield "|---|" + "---|" * len(TOKENS_A_REQUEST)
    for rate in REQUESTS_A_SECOND:
        cells = (f"{replicas(rate, tokens, fixed)}, {replicas(rate, tokens, adaptive)}" for tokens in TOKENS_A_REQUEST)
        yield f"| {rate} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(report(), end="")
