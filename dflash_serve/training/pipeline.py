"""The phases from prompts to a measured drafter, each leaving a file that the next one reads.

OUT/answers.npz          the target's answers to the training prompts
OUT/bench_answers.npz    its answers to the benchmark prompts
OUT/drafter/             the checkpoint; OUT/state.pt to go on with; OUT/train.jsonl the log; OUT/trained.json when done
OUT/acceptance.json      simulated acceptance by task; OUT/acceptance.txt the same as a table
OUT/training.png, .svg   curves
OUT/phases.json          seconds and figures of each phase
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from dflash_serve.training.data import Corpus, Prompt, read_bench, read_prompts
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.generate import answer_prompts
from dflash_serve.training.plot import plot
from dflash_serve.training.progress import PhaseProgress
from dflash_serve.training.simulate import Acceptance, acceptance_by_task, match_lengths
from dflash_serve.training.target import Target
from dflash_serve.training.train import StepSums, Trainer, TrainSettings, train


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_target(folder: Path, device: torch.device) -> Target:
    """bfloat16 on a GPU, float32 on a CPU."""
    return Target(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


@dataclass(frozen=True)
class GenerateSettings:
    max_new_tokens: int = 512
    batch_size: int = 4096
    stop_fraction: float = 0.97
    limit: int | None = None


def generate(target: Target, prompts: Sequence[Prompt], path: Path, settings: GenerateSettings) -> dict[str, Any]:
    """Answer prompts into `path`; returns figures about it."""
    if settings.limit is not None and settings.limit < len(prompts):
        # Spread over the file, so that every source stays represented.
        prompts = [prompts[i] for i in np.linspace(0, len(prompts) - 1, settings.limit).astype(int)]
    turns = sum(len(prompt.turns) for prompt in prompts)
    with PhaseProgress(f"generate {path.name}", turns) as progress:
        corpus, times = answer_prompts(
            target,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            stop_fraction=settings.stop_fraction,
            progress=lambda done: progress.update(done, f"{done} answers"),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    corpus.save(path)
    return {
        "answers": len(corpus),
        "finished_share": round(float(corpus.finished.mean()), 4),
        "prompt_tokens": int(corpus.prompt_lengths.sum()),
        "answer_tokens": times.tokens,
        "prefill_seconds": round(times.prefill_seconds, 2),
        "decode_seconds": round(times.decode_seconds, 2),
        "decode_steps": times.steps,
        "seconds_per_decode_step": round(times.decode_seconds / max(times.steps, 1), 5),
    }


def simulate(
    target: Target, drafter: DFlashDrafter, corpus: Corpus, documents: Sequence[int], settings: TrainSettings
) -> dict[str, dict[int, Acceptance]]:
    """Acceptance by task and number of draft tokens, for the drafter's block size and those of `settings` below it."""
    own = drafter.config.block_size
    results: dict[str, dict[int, Acceptance]] = {}
    for block_size in sorted({own, *(size for size in settings.block_sizes if size < own)}):
        matches = match_lengths(
            target,
            drafter,
            corpus,
            documents,
            block_size=block_size,
            row_length=settings.row_length,
            anchors_per_row=settings.anchors(block_size),
            rows_per_pass=settings.rows_per_step,
            use_tiles=target.device.type == "cuda",
        )
        for task, found in acceptance_by_task(corpus, documents, matches, block_size - 1).items():
            results.setdefault(task, {})[block_size - 1] = found
    return results


def acceptance_json(result: dict[str, dict[int, Acceptance]]) -> dict[str, Any]:
    return {task: {str(k): value.to_json() for k, value in by_k.items()} for task, by_k in result.items()}


def acceptance_table(result: dict[str, dict[int, Acceptance]]) -> str:
    """Acceptance length by task and number of draft tokens (K), and the rates at the largest K, as plain text."""
    lengths = list(next(iter(result.values())))
    width = max(len(task) for task in result)
    lines = ["acceptance length (tokens per verification, bonus token included)"]
    lines.append(" ".join([f"{'task':<{width}}", *(f"{f'K={k}':>7}" for k in lengths)]))
    lines += [
        " ".join([f"{task:<{width}}", *(f"{by_k[k].acceptance_length:7.3f}" for k in lengths)])
        for task, by_k in result.items()
    ]
    lines += ["", f"share of verifications that accept each draft token, K={lengths[-1]}"]
    lines += [
        " ".join([f"{task:<{width}}", *(f"{rate:5.3f}" for rate in by_k[lengths[-1]].rates)])
        for task, by_k in result.items()
    ]
    return "\n".join(lines)


def run(
    target_folder: Path,
    prompts_path: Path,
    bench_folder: Path,
    out: Path,
    train_settings: TrainSettings,
    generate_settings: GenerateSettings,
    *,
    bench_limit: int | None = None,
    leave_after_seconds: float = math.inf,
    profile: bool = False,
) -> bool:
    """Every phase that has no output yet; returns whether all is done (else call again)."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    device = default_device()
    phases = Phases(out / "phases.json")
    target = load_target(target_folder, device)
    print(f"target: {target_folder}, {target.config.num_layers} layers, on {_device_name(device)}", flush=True)

    bench_path, answers_path = out / "bench_answers.npz", out / "answers.npz"
    if not bench_path.is_file():
        settings = GenerateSettings(generate_settings.max_new_tokens, generate_settings.batch_size, 1.0, bench_limit)
        with phases.timed("generate bench") as figures:
            figures |= generate(target, read_bench(bench_folder), bench_path, settings)
    if not answers_path.is_file():
        with phases.timed("generate") as figures:
            figures |= generate(target, read_prompts(prompts_path), answers_path, generate_settings)
    corpus, bench = Corpus.load(answers_path), Corpus.load(bench_path)
    if device.type == "cuda":
        torch.cuda.empty_cache()

    trainer = Trainer(target, corpus, train_settings)
    if not (out / "trained.json").is_file():
        with phases.timed("train") as figures:
            report = train(trainer, out, leave_after_seconds - (time.monotonic() - began))
            figures |= asdict(report)
        if profile and device.type == "cuda":
            _profile(trainer)
        if not report.finished:
            print(
                f"train: left at {trainer.elapsed_seconds:.0f} s of {train_settings.seconds:.0f} s; run again to go on",
                flush=True,
            )
            return False
        (out / "trained.json").write_text(json.dumps(asdict(train_settings), indent=2) + "\n")

    if not (out / "acceptance.json").is_file():
        with phases.timed("simulate"):
            trainer.drafter.load_checkpoint(out / "drafter")
            fitting = [i for i in trainer.held_out.tolist() if corpus.lengths[i] <= train_settings.row_length]
            results = {
                "bench": simulate(target, trainer.drafter, bench, range(len(bench)), train_settings),
                "held_out": simulate(target, trainer.drafter, corpus, fitting, train_settings),
            }
        table = "\n\n".join(f"== {name}\n{acceptance_table(result)}" for name, result in results.items())
        print(table, flush=True)
        (out / "acceptance.txt").write_text(table + "\n")
        (out / "acceptance.json").write_text(
            json.dumps({n: acceptance_json(r) for n, r in results.items()}, indent=1) + "\n"
        )
    with phases.timed("plot"):
        plot(out / "train.jsonl", out)
    print(f"done: {out}", flush=True)
    return True


class Phases:
    """Seconds, figures and peak device memory of each phase, kept in a JSON file and printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def timed(self, name: str) -> Iterator[dict[str, Any]]:
        """Yields a dict for the phase's own figures."""
        figures: dict[str, Any] = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        yield figures
        figures["seconds"] = round(time.monotonic() - began, 2)
        if torch.cuda.is_available():
            figures["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.done[name] = figures
        self.path.write_text(json.dumps(self.done, indent=1) + "\n")
        print(f"{name}: {json.dumps(figures)}", flush=True)


def _profile(trainer: Trainer) -> None:
    """Print where the device time of three training steps goes."""
    rows = trainer.epoch_rows(0).select(slice(0, trainer.settings.rows_per_step))
    sums = StepSums.zero(trainer.settings.block_size - 1, trainer.device)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for step in range(3):
            trainer.backward(rows, step, sums)
            trainer.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    print(
        profiler.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=60),
        flush=True,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
