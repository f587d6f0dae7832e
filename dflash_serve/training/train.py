"""Training: packed rows, fresh random anchors at every step, a learning rate that follows the clock.

The budget is wall-clock time, so the schedule is driven by the share of it that has passed and always ends. A run can
be stopped and begun again: the state holds the clock, and rows and anchors are drawn from the step number.
"""

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_serve.training.blocks import RowBatch, block_labels, context_features, draft, draw_anchors
from dflash_serve.training.data import Corpus, pack_rows, split_held_out
from dflash_serve.training.drafter import DFlashDrafter, DrafterConfig
from dflash_serve.training.loss import head_loss, slot_weights
from dflash_serve.training.progress import PhaseProgress
from dflash_serve.training.simulate import acceptance, match_lengths
from dflash_serve.training.target import Target

LOG_SECONDS = 5.0
SAVE_SECONDS = 60.0
WARM_UP_FRACTION = 0.04
CLIP_NORM = 1.0


@dataclass(frozen=True)
class TrainSettings:
    """What a training run needs to know. `python -m dflash_serve.training train --help` explains each."""

    seconds: float
    max_steps: int | None = None
    num_layers: int = 4
    block_sizes: tuple[int, ...] = (8, 16, 8, 4)
    target_layer_ids: tuple[int, ...] = (1, 8, 14, 20, 27)
    mask_token_id: int = 4
    row_length: int = 4096
    anchors_per_row: int = 1024
    rows_per_step: int = 4
    learning_rate: float = 6e-4
    weight_decay: float = 0.01
    gamma: float = 7.0
    validation_documents: int = 256
    seed: int = 0
    begin_with: str | None = None

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds: {self.seconds} must be positive")
        if not 1 <= self.anchors_per_row <= self.row_length:
            raise ValueError(
                f"anchors_per_row: {self.anchors_per_row} must lie in 1..{self.row_length} (the row length)"
            )
        if not self.block_sizes or min(self.block_sizes) < 2:
            raise ValueError(f"block_sizes: {list(self.block_sizes)} must hold numbers of 2 or more")

    @property
    def block_size(self) -> int:
        """The drafter's: the largest that it learns."""
        return max(self.block_sizes)

    def anchors(self, block_size: int) -> int:
        """Blocks in a row: as many draft slots for small blocks as `anchors_per_row` of the largest have."""
        return min(self.row_length, self.anchors_per_row * self.block_size // block_size)


def learning_rate_scale(fraction: float) -> float:
    """Linear warm-up, then a cosine to zero; `fraction` is the share of the budget that has passed."""
    if fraction < WARM_UP_FRACTION:
        return fraction / WARM_UP_FRACTION
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - WARM_UP_FRACTION) / (1 - WARM_UP_FRACTION))))


@dataclass
class StepSums:
    """Sums over the steps since the last log line, on the device, so that a step waits for nothing."""

    loss: Tensor
    correct: Tensor
    valid: Tensor
    gradient_norm: Tensor
    steps: int = 0

    @classmethod
    def zero(cls, slots: int, device: torch.device) -> "StepSums":
        return cls(
            torch.zeros((), device=device),
            torch.zeros(slots, device=device),
            torch.zeros(slots, device=device),
            torch.zeros((), device=device),
        )


@dataclass
class TrainReport:
    """How a call of `train` went; `finished` is false when it left before the budget was used up."""

    finished: bool
    steps: int
    compile_seconds: float
    step_seconds: float
    context_tokens_per_second: float
    last_log: dict[str, Any] = field(default_factory=dict)


class Trainer:
    def __init__(self, target: Target, corpus: Corpus, settings: TrainSettings) -> None:
        self.target, self.corpus, self.settings = target, corpus, settings
        self.device = target.device
        self.use_tiles = self.device.type == "cuda"
        torch.manual_seed(settings.seed)
        config = DrafterConfig.for_target(
            target.config, settings.num_layers, settings.block_size, settings.target_layer_ids, settings.mask_token_id
        )
        self.drafter = DFlashDrafter(config).to(self.device)
        if settings.begin_with is not None:
            self.drafter.load_checkpoint(Path(settings.begin_with))
        if self.device.type == "cuda":
            self.drafter.compile_layers()
        self.optimizer = torch.optim.AdamW(
            self.drafter.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.slot_weights = {size: slot_weights(size, settings.gamma, self.device) for size in settings.block_sizes}
        self.generator = torch.Generator(self.device)
        self.training_documents, self.held_out = split_held_out(len(corpus), settings.seed)
        self.validation_documents = self.held_out[: settings.validation_documents]
        self.step = 0
        self.elapsed_seconds = 0.0

    def epoch_rows(self, epoch: int) -> RowBatch:
        """All rows of an epoch, documents in a new order."""
        settings = self.settings
        order = np.random.default_rng((settings.seed, epoch)).permutation(self.training_documents)
        rows = pack_rows(self.corpus, order, settings.row_length, multiple_of=settings.rows_per_step)
        return RowBatch.on_device(rows, self.device)

    def backward(self, rows: RowBatch, step: int, sums: StepSums) -> None:
        """Forward and backward pass of one step; gradients are left in the parameters."""
        settings = self.settings
        block_size = settings.block_sizes[step % len(settings.block_sizes)]
        self.generator.manual_seed(settings.seed * 1_000_003 + step)
        anchors, real = draw_anchors(rows.anchor_candidates(), settings.anchors(block_size), self.generator)
        features = context_features(self.target, rows, self.drafter.config.target_layer_ids, self.use_tiles)
        labels, valid = block_labels(rows, anchors, real, block_size)
        hidden = draft(self.target, self.drafter, rows, features, anchors, block_size, self.use_tiles)
        weights = self.slot_weights[block_size] * valid
        weights = weights / weights.sum().clamp_min(1e-6)
        loss, correct = head_loss(hidden.flatten(0, 2), self.target.head, labels.flatten(), weights.flatten())
        loss.backward()
        sums.loss += loss.detach()
        sums.correct[: block_size - 1] += (correct.view(valid.shape) & valid).sum(dim=(0, 1))
        sums.valid[: block_size - 1] += valid.sum(dim=(0, 1))

    def update(self, fraction: float, sums: StepSums) -> float:
        """Clip, step the optimiser, drop the gradients; returns the learning rate used."""
        rate = self.settings.learning_rate * learning_rate_scale(fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums.gradient_norm += torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sums.steps += 1
        return rate

    def validate(self) -> dict[str, float]:
        """Simulated acceptance length on held-out prompts, by number of draft tokens."""
        return {
            str(size - 1): round(
                acceptance(self.match_lengths(self.validation_documents, size), size - 1).acceptance_length, 4
            )
            for size in sorted(self.slot_weights)
        }

    def match_lengths(self, documents: NDArray[np.int64], block_size: int) -> list[NDArray[np.int64]]:
        fitting = documents[self.corpus.lengths[documents] <= self.settings.row_length]
        return match_lengths(
            self.target,
            self.drafter,
            self.corpus,
            fitting.tolist(),
            block_size=block_size,
            row_length=self.settings.row_length,
            anchors_per_row=self.settings.anchors(block_size),
            rows_per_pass=self.settings.rows_per_step,
            use_tiles=self.use_tiles,
        )

    def save_state(self, path: Path) -> None:
        part = path.with_suffix(".part")
        state = {
            "settings": asdict(self.settings),
            "drafter": self.drafter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_seconds": self.elapsed_seconds,
        }
        torch.save(state, part)
        os.replace(part, path)

    def load_state(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        ours = asdict(self.settings)
        changed = [
            name for name in ours if ours[name] != state["settings"][name] and name not in ("seconds", "max_steps")
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: not what {path} was trained with; use the old value or a new --out"
            )
        self.drafter.load_state_dict(state["drafter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_seconds = state["step"], state["elapsed_seconds"]


def train(trainer: Trainer, out: Path, leave_after_seconds: float = math.inf) -> TrainReport:
    """Train until the budget is used up; writes drafter/, state.pt and train.jsonl into `out`.

    Args:
        leave_after_seconds: save and return after this long, budget used up or not; call again to go on.

    The clock of the budget starts once everything is compiled.
    """
    called = time.monotonic()
    settings, device = trainer.settings, trainer.device
    out.mkdir(parents=True, exist_ok=True)
    state_path, log_path = out / "state.pt", out / "train.jsonl"
    if state_path.is_file():
        trainer.load_state(state_path)
        print(
            f"train: going on from step {trainer.step}, {trainer.elapsed_seconds:.0f} of {settings.seconds:.0f} s used",
            flush=True,
        )

    with ThreadPoolExecutor(1) as pool, PhaseProgress("train", 1.0) as progress, log_path.open("a") as log:
        rows = trainer.epoch_rows(0)
        steps_per_epoch = len(rows.tokens) // settings.rows_per_step
        compile_seconds = _compile(trainer, rows)
        print(
            f"train: {trainer.drafter.num_parameters:,} parameters, {len(trainer.training_documents):,} documents, "
            f"{steps_per_epoch} steps an epoch, compiled in {compile_seconds:.0f} s",
            flush=True,
        )
        epoch = trainer.step // steps_per_epoch
        if epoch > 0:
            rows = trainer.epoch_rows(epoch)
        following = pool.submit(trainer.epoch_rows, epoch + 1)

        first_step, began, before = trainer.step, time.monotonic(), trainer.elapsed_seconds
        validation_seconds = 0.0
        last_log = last_save = began
        sums = StepSums.zero(settings.block_size - 1, device)
        line: dict[str, Any] = {}

        def fraction() -> float:
            by_time = (before + time.monotonic() - began) / settings.seconds
            return max(by_time, trainer.step / settings.max_steps) if settings.max_steps else by_time

        def leaving() -> bool:
            return time.monotonic() - called > leave_after_seconds

        ending = fraction() >= 1.0 or leaving()
        while not ending:
            if trainer.step // steps_per_epoch > epoch:
                epoch += 1
                rows = following.result()
                # Packing differs by a row or two between epochs; what one epoch leaves over is dropped.
                following = pool.submit(trainer.epoch_rows, epoch + 1)
            place = trainer.step % steps_per_epoch % max(1, len(rows.tokens) // settings.rows_per_step)
            low = place * settings.rows_per_step
            trainer.backward(rows.select(slice(low, low + settings.rows_per_step)), trainer.step, sums)
            rate = trainer.update(fraction(), sums)
            trainer.step += 1

            now = time.monotonic()
            ending = fraction() >= 1.0 or leaving()
            if now - last_log >= LOG_SECONDS or ending:
                line = _log_line(trainer, sums, rate, epoch, before + now - began, (now - last_log))
                saving = now - last_save >= SAVE_SECONDS or ending
                if saving:
                    line["validation_acceptance_length"] = trainer.validate()
                    trainer.elapsed_seconds = before + time.monotonic() - began
                    trainer.drafter.save(out / "drafter")
                    trainer.save_state(state_path)
                    validation_seconds += time.monotonic() - now
                    last_save = time.monotonic()
                log.write(json.dumps(line) + "\n")
                log.flush()
                if not math.isfinite(line["loss"]):
                    raise ArithmeticError(
                        f"train: the loss is {line['loss']} at step {trainer.step}; lower --learning-rate"
                    )
                sums = StepSums.zero(settings.block_size - 1, device)
                last_log = time.monotonic()
                progress.update(min(1.0, fraction()), _note(line))
        following.cancel()

    finished = fraction() >= 1.0
    steps = trainer.step - first_step
    step_seconds = (time.monotonic() - began - validation_seconds) / max(steps, 1)
    context_tokens = settings.row_length * settings.rows_per_step
    return TrainReport(finished, steps, compile_seconds, step_seconds, context_tokens / max(step_seconds, 1e-9), line)


def _compile(trainer: Trainer, rows: RowBatch) -> float:
    """Run every compiled path once, changing nothing; returns the seconds it took."""
    began = time.monotonic()
    sums = StepSums.zero(trainer.settings.block_size - 1, trainer.device)
    for step in range(len(trainer.settings.block_sizes)):
        trainer.backward(rows.select(slice(0, trainer.settings.rows_per_step)), step, sums)
    trainer.optimizer.zero_grad(set_to_none=True)
    for block_size in set(trainer.settings.block_sizes):
        trainer.match_lengths(trainer.validation_documents[:1], block_size)
    if not math.isfinite(float(sums.loss)):
        raise ArithmeticError(f"train: the first loss is {float(sums.loss)}")
    return time.monotonic() - began


def _log_line(
    trainer: Trainer, sums: StepSums, rate: float, epoch: int, seconds: float, interval: float
) -> dict[str, Any]:
    """One line of train.jsonl. Reads the sums, and so waits for the device."""
    steps = max(sums.steps, 1)
    accuracy = (sums.correct / sums.valid.clamp_min(1)).tolist()
    settings = trainer.settings
    return {
        "step": trainer.step,
        "epoch": epoch,
        "seconds": round(seconds, 2),
        "loss": round(float(sums.loss) / steps, 5),
        "accuracy": [round(share, 4) for share in accuracy],
        "gradient_norm": round(float(sums.gradient_norm) / steps, 4),
        "learning_rate": rate,
        "context_tokens_per_second": round(steps * settings.rows_per_step * settings.row_length / max(interval, 1e-9)),
    }


def _note(line: dict[str, Any]) -> str:
    note = f"step {line['step']}, epoch {line['epoch']}, loss {line['loss']:.3f}, accuracy {line['accuracy'][0]:.3f}"
    if "validation_acceptance_length" in line:
        note += ", acceptance " + " ".join(
            f"K={k}: {value:.3f}" for k, value in line["validation_acceptance_length"].items()
        )
    return note + f", {line['context_tokens_per_second']:,} context tokens/s"
