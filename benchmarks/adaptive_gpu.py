"""Adaptive speculation against AR and K = 15 with Gemma-4-31B's shape on GPUs: dummy weights, forced acceptance.

    python -m benchmarks.adaptive_gpu --out FOLDER [--gpus 0,1] [--tasks mt_bench,gsm8k] [--seconds 4]
    python -m benchmarks.adaptive_gpu --out FOLDER --draw        the tables and the picture of what FOLDER holds

Two engines as a server has them (V2 runner, asynchronous scheduling, a process of their own): the target alone, and
the pair with its scheduler, which is told K = 15, K = 0, or to choose. AR has vLLM's own KV cache manager, the pair
ours, and each is measured with the other as well. Each has so many requests running at all times:
random prompts of 128 tokens and answers of 256, a new request for each that ends. With two GPUs each engine has its
own, otherwise the one runs after the other. Works from a checkout that is not installed. FOLDER/rows.jsonl grows as
it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gemma4_gpu import ROOT, first_gpu, plugin_path, random_prompt, settings_args

AR, DRAFTING = "ar", "drafting"
LOADS = (1, 8, 32, 64, 128)
LONGEST = 15
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 256
SETTLE_SECONDS = 1.5
LONGER_AT_ONE = 4
"""Times as long a cell of one request takes: its few verifications tell little of the mean."""
BROKEN = "broken drafter"
OWN = "own"
PLAIN, PLAIN_OURS = "AR", "AR, our KV cache manager"
NO_DRAFT, NO_DRAFT_OWN = "K=0", "K=0, vLLM's KV cache manager"
CONTROL = "DFLASH_BENCHMARK_CONTROL"
CONTROL_SECONDS = 0.25


class Told:
    """What the control file says: nothing, or a K, or OWN (vLLM's own KV cache manager), or both."""

    def __init__(self, scheduler: Any) -> None:
        from dflash_serve.vllm_ext.allocation import QuickKVCacheManager

        self._manager, self._path = scheduler.kv_cache_manager, Path(os.environ[CONTROL])
        self._read_at = 0.0
        if type(self._manager) is not QuickKVCacheManager:
            raise RuntimeError(f"the engine has vLLM's own KV cache manager ({type(self._manager).__name__})")
        self.draft_tokens: int | None = None

    def look(self) -> None:
        """Read it now and then, and have the manager that it says."""
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        from dflash_serve.vllm_ext.allocation import quicken

        if time.monotonic() - self._read_at < CONTROL_SECONDS:
            return
        self._read_at = time.monotonic()
        words = self._path.read_text().split()
        self.draft_tokens = next((int(word) for word in words if word.isdecimal()), None)
        if OWN in words:
            self._manager.__class__ = KVCacheManager
        else:
            # does nothing where it is ours already
            quicken(self._manager)


class ToldScheduler:
    """Stands for the scheduler of its engine (`scheduler_cls`) and does as the control file says."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        from dflash_serve.vllm_ext.scheduler import AdaptiveScheduler

        scheduler: Any
        if vllm_config.speculative_config is not None:
            scheduler = AdaptiveScheduler(vllm_config, *args, **kwargs)
        else:
            ahead = vllm_config.scheduler_config.async_scheduling
            scheduler = (AsyncScheduler if ahead else Scheduler)(vllm_config, *args, **kwargs)
        told, own = Told(scheduler), scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            told.look()
            if isinstance(scheduler, AdaptiveScheduler):
                scheduler.draft_length.force(told.draft_tokens)
            return own(*args, **kwargs)

        scheduler.schedule = schedule
        return scheduler


def set_rate(worker: Any, rate: float) -> bool:
    """In the engine's worker: every draft token is accepted with that chance. Whether acceptance is forced at all."""
    rates = getattr(worker.model_runner.rejection_sampler, "synthetic_conditional_rates", None)
    if rates is None:
        return False
    rates.fill_(rate)
    return True


class Load:
    """So many requests running at all times."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._random = random.Random(0)
        self._number = 0
        self._live: set[str] = set()

    def start(self, requests: int) -> None:
        for _ in range(requests):
            self._add(self._random.randrange(OUTPUT_TOKENS // 8, OUTPUT_TOKENS))

    def _add(self, output_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._number += 1
        name = f"request-{self._number}"
        self._live.add(name)
        prompt = random_prompt(PROMPT_TOKENS, self._random)
        sampling = SamplingParams(
            temperature=0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def run(self, seconds: float) -> tuple[int, int, float]:
        """(Output tokens, outputs that they came in, seconds); every request that ends is replaced."""
        tokens, outputs, started = 0, 0, time.monotonic()
        while time.monotonic() - started < seconds:
            for output in self._engine.step():
                tokens += len(output.outputs[0].token_ids)
                outputs += 1
                if output.finished:
                    self._live.discard(output.request_id)
                    self._add(OUTPUT_TOKENS)
        return tokens, outputs, time.monotonic() - started

    def stop(self) -> None:
        self._engine.abort_request(list(self._live))
        self._live.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()


def cells(side: str, tasks: list[str], loads: list[int], longest: int) -> Iterator[tuple[str, float, str, str, int]]:
    """(Task, acceptance length at K = 15, side, what to force, requests), the most telling first."""
    from dflash_serve.bench.card import acceptance_length

    if side == AR:
        for load in loads:
            yield "", 1.0, PLAIN, OWN, load
            yield "", 1.0, PLAIN_OURS, "", load
        return
    for task in tasks:
        length = acceptance_length(task) or 4.0
        for load in loads:
            for side, forced in (("K=15", str(longest)), ("adaptive", "")):
                yield task, length, side, forced, load
    for load in loads:
        yield BROKEN, 1.0, "adaptive", "", load
    for load in loads:
        yield "", 1.0, NO_DRAFT, "0", load
        yield "", 1.0, NO_DRAFT_OWN, f"0 {OWN}", load


def measure(folder: Path, side: str, tasks: list[str], loads: list[int], seconds: float, *, tiny: bool) -> None:
    """One engine, all its cells."""
    from vllm import LLM

    from dflash_serve.settings import Cluster, resolve
    from dflash_serve.settings.profiles import merge
    from dflash_serve.settings.translate import engine_args
    from dflash_serve.speculation.estimate import expected_tokens, rate_of_length
    from dflash_serve.speculation.report import REPORT_VARIABLE, read_report

    args = settings_args(folder / "models", profile="gemma4-31b-h200", tiny=tiny)
    speculation: dict[str, Any] = {"mode": "off"}
    if side == DRAFTING:
        speculation = {"mode": "adaptive"}
        if not tiny:
            speculation["options"] = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 4.0}
    args = merge(args, {"engine": {"max_num_seqs": max(*loads, 1)}, "speculation": speculation})
    if not tiny:
        args = merge(args, {"engine": {"max_model_len": 8192}})
    settings = resolve(args, Cluster(cpus=1, gpus={})).settings
    arguments = engine_args(settings)
    control, report = folder / f"control-{side}", folder / f"report-{side}.json"
    control.write_text("")
    os.environ |= {CONTROL: str(control), REPORT_VARIABLE: str(report), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    arguments["scheduler_cls"] = "benchmarks.adaptive_gpu.ToldScheduler"
    started = time.monotonic()
    llm = LLM(model=settings.target, disable_log_stats=True, **arguments)
    about = {
        "engine_start_seconds": round(time.monotonic() - started, 1),
        "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
        "async_scheduling": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
    }
    rows = (folder / "rows.jsonl").open("a")

    def put(row: dict[str, Any]) -> None:
        rows.write(json.dumps(row) + "\n")
        rows.flush()
        print(json.dumps(row), flush=True)

    put({"side": side, "about": about})
    load = Load(llm)
    # each load once unmeasured: kernels are compiled, the step costs learned
    for requests in loads:
        load.start(requests)
        load.run(SETTLE_SECONDS)
        load.stop()
    for task, length, name, forced, requests in cells(side, tasks, loads, settings.speculation.max_draft_tokens):
        control.write_text(forced)
        rate = rate_of_length(length, LONGEST)
        if side == DRAFTING and not tiny:
            (forces,) = llm.collective_rpc(set_rate, args=(rate,))
            assert forces, "the runner does not force acceptance"
        load.start(requests)
        first = load.run(SETTLE_SECONDS)
        before = read_report(report) or {}
        tokens, outputs, took = load.run(seconds * (LONGER_AT_ONE if requests == 1 else 1))
        after = read_report(report) or {}
        load.stop()
        row: dict[str, Any] = {
            "side": name,
            "task": task,
            "acceptance_length_at_15": length if side == DRAFTING else None,
            "requests": requests,
            "tokens_per_second": round(tokens / took, 1),
            "first_seconds_tokens_per_second": round(first[0] / first[2], 1),
            "outputs_per_second": round(outputs / took, 2),
        }
        if side == DRAFTING:
            was = before.get("steps_by_draft_tokens", {})
            steps = {k: n - was.get(k, 0) for k, n in after.get("steps_by_draft_tokens", {}).items()}
            row |= {
                "steps_by_k": {k: n for k, n in steps.items() if n},
                "trial_steps": after.get("trial_steps", 0) - before.get("trial_steps", 0),
                "cost_error_ratio": round(after.get("cost_error_ratio") or 0, 4),
            }
            if any(steps.values()):
                mean = expected_tokens([rate] * LONGEST)
                per_output = sum(n * mean[int(k)] for k, n in steps.items()) / sum(steps.values())
                row["expected_tokens_per_second"] = round(per_output * outputs / took, 1)
        put(row)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: tokens/s and ratios by task and load.

    "By mean" is what the verifications that ran give at their mean, without the luck of those that ran: at one request
    that luck is several per cent.
    """
    speed = {(row["side"], row["task"], row["requests"]): row for row in rows if "requests" in row}
    lines = [
        "| task | requests | AR | K=15 | adaptive | adaptive / AR | adaptive / K=15 | the same by mean | K chosen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, task, requests in speed:
        if side != "adaptive":
            continue
        row = speed[side, task, requests]
        ar, fixed = speed.get((PLAIN, "", requests)), speed.get(("K=15", task, requests))
        own = row["tokens_per_second"]

        def over(other: dict[str, Any] | None, own: float = own) -> str:
            return f"{own / other['tokens_per_second']:.2f}" if other else "–"

        means = [one.get("expected_tokens_per_second") if one else None for one in (row, fixed)]

        steps = sorted(row.get("steps_by_k", {}).items(), key=lambda item: -item[1])
        cells = [
            task,
            str(requests),
            *(f"{other['tokens_per_second']:.0f}" if other else "–" for other in (ar, fixed, row)),
            over(ar),
            over(fixed),
            f"{means[0] / means[1]:.2f}" if means[0] and means[1] else "–",
            ", ".join(f"{k} ({n})" for k, n in steps[:3]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    others = [side for side in (PLAIN_OURS, NO_DRAFT, NO_DRAFT_OWN) if any(side == key[0] for key in speed)]
    head = ["requests", PLAIN, *(name for side in others for name in (side, "over AR"))]
    none = [load for load in LOADS if (NO_DRAFT, "", load) in speed]
    if none:
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for load in none:
        base = speed.get((PLAIN, "", load))
        line = [str(load), f"{base['tokens_per_second']:.0f}" if base else "–"]
        for side in others:
            found = speed.get((side, "", load))
            line.append(f"{found['tokens_per_second']:.0f}" if found else "–")
            line.append(f"{found['tokens_per_second'] / base['tokens_per_second']:.2f}" if found and base else "–")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over AR by load, a panel a task."""
    from matplotlib.figure import Figure

    speed = {(r["side"], r["task"], r["requests"]): r["tokens_per_second"] for r in rows if "requests" in r}
    tasks = list(dict.fromkeys(task for side, task, _ in speed if side == "adaptive"))
    figure = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for side, colour, marker in (("K=15", "tab:gray", "s"), ("adaptive", "tab:green", "o")):
            loads = [n for n in LOADS if (side, task, n) in speed and (PLAIN, "", n) in speed]
            if loads:
                ratios = [speed[side, task, n] / speed["AR", "", n] for n in loads]
                panel.plot(loads, ratios, color=colour, marker=marker, label=side)
        panel.axhline(1, color="black", linewidth=1, linestyle=":", label="AR")
        panel.set(title=task, xlabel="requests at once", xscale="log")
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panel.set_xticks(LOADS, [str(n) for n in LOADS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens/s over AR's")
    panels[0].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", default=first_gpu(), help="one or two CUDA devices (default: the first there is)")
    parser.add_argument("--tasks", default="mt_bench,gsm8k")
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny pair on a CPU, nothing forced")
    parser.add_argument("--side", choices=(AR, DRAFTING), help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.side:
        loads = [int(n) for n in options.loads.split(",")]
        measure(folder, options.side, options.tasks.split(","), loads, options.seconds, tiny=options.tiny)
        return
    if not options.draw:
        # both engines read the models
        settings_args(folder / "models", profile="gemma4-31b-h200", tiny=options.tiny)
        gpus = options.gpus.split(",")
        environment = os.environ | {"PYTHONPATH": plugin_path(folder)}
        processes = []
        # AR first, being short: what else is compared with it
        for side, gpu in ((AR, gpus[-1]), (DRAFTING, gpus[0])):
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.adaptive_gpu", *sys.argv[1:], "--side", side],
                cwd=ROOT,
                env=environment | {"CUDA_VISIBLE_DEVICES": gpu},
            )
            processes.append(process)
            if len(gpus) == 1:
                process.wait()
        failed = [process.wait() for process in processes]
        if any(failed):
            sys.exit(f"an engine failed: {failed}")
    rows = read_rows(folder)
    print(table(rows))
    draw(rows, folder / "speed.png")


if __name__ == "__main__":
    main()
