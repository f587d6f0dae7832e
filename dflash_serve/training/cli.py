"""`python -m dflash_serve.training`: one command for each phase, and `run` for all of them."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from dflash_serve.training import pipeline
from dflash_serve.training.data import Corpus, read_bench, read_prompts
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.pipeline import GenerateSettings
from dflash_serve.training.plot import plot
from dflash_serve.training.train import Trainer, TrainSettings, train

UNFINISHED = 3
"""Exit status when training left before its budget was used up."""

SMOKE_GENERATE = GenerateSettings(max_new_tokens=96, limit=4096)
SMOKE_STEPS = 20
SMOKE_BENCH_LIMIT = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input, 3 training left early (run again to go on)."""
    options = _parser().parse_args(arguments)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    else:
        # Softmax gradients hold many denormal numbers, with which a CPU multiplies some twenty times slower.
        torch.set_flush_denormal(True)
    try:
        status: int = options.command(options)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def _run(options: argparse.Namespace) -> int:
    train_settings, generate_settings = _train_settings(options), _generate_settings(options)
    bench_limit = None
    if options.smoke:
        generate_settings, bench_limit = SMOKE_GENERATE, SMOKE_BENCH_LIMIT
        train_settings = _train_settings(options, max_steps=SMOKE_STEPS)
    finished = pipeline.run(
        options.target,
        options.prompts,
        options.bench,
        options.out,
        train_settings,
        generate_settings,
        bench_limit=bench_limit,
        leave_after_seconds=options.leave_after,
        profile=options.smoke,
    )
    return 0 if finished else UNFINISHED


def _generate(options: argparse.Namespace) -> int:
    prompts = read_bench(options.prompts) if options.prompts.is_dir() else read_prompts(options.prompts)
    target = pipeline.load_target(options.target, pipeline.default_device())
    print(json.dumps(pipeline.generate(target, prompts, options.out, _generate_settings(options)), indent=1))
    return 0


def _train(options: argparse.Namespace) -> int:
    target = pipeline.load_target(options.target, pipeline.default_device())
    trainer = Trainer(target, Corpus.load(options.answers), _train_settings(options))
    report = train(trainer, options.out, options.leave_after)
    print(f"train: {report.steps} steps, {report.step_seconds:.4f} s a step, finished: {report.finished}")
    return 0 if report.finished else UNFINISHED


def _simulate(options: argparse.Namespace) -> int:
    device = pipeline.default_device()
    target, drafter = pipeline.load_target(options.target, device), DFlashDrafter.load(options.drafter, device)
    if device.type == "cuda":
        drafter.compile_layers()
    corpus = Corpus.load(options.answers)
    result = pipeline.simulate(target, drafter, corpus, range(len(corpus)), _train_settings(options, seconds=1.0))
    print(pipeline.acceptance_table(result))
    if options.json:
        options.json.write_text(json.dumps(pipeline.acceptance_json(result), indent=1) + "\n")
    return 0


def _plot(options: argparse.Namespace) -> int:
    for path in plot(options.out / "train.jsonl", options.out):
        print(path)
    return 0


def _train_settings(options: argparse.Namespace, **fixed: float | int) -> TrainSettings:
    given = {f.name: getattr(options, f.name) for f in fields(TrainSettings) if hasattr(options, f.name)}
    return TrainSettings(**(given | fixed))


def _generate_settings(options: argparse.Namespace) -> GenerateSettings:
    return GenerateSettings(options.max_new_tokens, options.batch_size, options.stop_fraction, options.limit)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dflash_serve.training",
        description="Train a DFlash drafter for a target, from a file of prompts. `run` does everything; the other "
        "commands are its phases. Uses the GPU if there is one (bfloat16), else the CPU (float32).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "run", _run, "every phase whose output is missing: generate, train, simulate, plot")
    _target(command)
    command.add_argument("--prompts", type=Path, required=True, help='training prompts: JSONL with "prompt", "source"')
    command.add_argument("--bench", type=Path, required=True, help="folder of gsm8k.jsonl, humaneval.jsonl and so on")
    command.add_argument("--out", type=Path, required=True, help="folder for all output; begin again there to go on")
    command.add_argument(
        "--smoke",
        action="store_true",
        help=f"try everything briefly ({SMOKE_GENERATE.limit} prompts of {SMOKE_GENERATE.max_new_tokens} tokens, "
        f"{SMOKE_STEPS} training steps) and print timings and a profile",
    )
    _generate_options(command)
    _train_options(command)

    command = _command(commands, "generate", _generate, "greedy answers by the target itself")
    _target(command)
    command.add_argument(
        "--prompts", type=Path, required=True, help="JSONL of prompts, or a folder of benchmark prompts"
    )
    command.add_argument("--out", type=Path, required=True, help="the .npz to write")
    _generate_options(command)

    command = _command(commands, "train", _train, "train a drafter on answers")
    _target(command)
    command.add_argument("--answers", type=Path, required=True, help="the .npz that `generate` wrote")
    command.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the state and the log")
    _train_options(command)

    command = _command(commands, "simulate", _simulate, "acceptance of a drafter on answers, without serving")
    _target(command)
    command.add_argument("--drafter", type=Path, required=True, help="checkpoint folder")
    command.add_argument("--answers", type=Path, required=True, help="the .npz that `generate` wrote")
    command.add_argument("--json", type=Path, help="also write the result here")
    _row_options(command)

    command = _command(commands, "plot", _plot, "curves of train.jsonl as PNG and SVG")
    command.add_argument("--out", type=Path, required=True, help="the folder that `train` or `run` wrote to")
    return parser


def _command(commands, name, function, description):  # type: ignore[no-untyped-def]
    command = commands.add_parser(
        name, help=description, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(command=function)
    return command


def _target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target", type=Path, required=True, help="Hugging Face folder of the target (Llama, Qwen2, Qwen3)"
    )


def _generate_options(command: argparse.ArgumentParser) -> None:
    default = GenerateSettings()
    group = command.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="longest answer")
    group.add_argument("--batch-size", type=int, default=default.batch_size, help="sequences decoded together, at most")
    group.add_argument(
        "--stop-fraction",
        type=float,
        default=default.stop_fraction,
        help="end a batch when this share has finished; the rest are kept, cut short",
    )
    group.add_argument("--limit", type=int, help="use this many prompts only, spread over the file")


def _row_options(command: argparse.ArgumentParser) -> None:
    default = TrainSettings(seconds=1.0)
    group = command.add_argument_group("packed rows")
    group.add_argument(
        "--block-sizes",
        type=_numbers,
        default=default.block_sizes,
        metavar="B,B,...",
        help="bonus token and draft tokens of a block (a server that drafts K runs K + 1), one after another by step",
    )
    group.add_argument("--row-length", type=int, default=default.row_length, help="context tokens in a row")
    group.add_argument(
        "--anchors-per-row", type=int, default=default.anchors_per_row, help="draft blocks of the largest size in a row"
    )
    group.add_argument("--rows-per-step", type=int, default=default.rows_per_step, help="rows in a forward pass")


def _train_options(command: argparse.ArgumentParser) -> None:
    default = TrainSettings(seconds=1.0)
    _row_options(command)
    group = command.add_argument_group("training")
    group.add_argument("--seconds", type=float, default=600.0, help="budget; the learning rate reaches zero with it")
    group.add_argument("--max-steps", type=int, help="end after this many steps if that comes first")
    group.add_argument(
        "--leave-after",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help=f"save and exit with status {UNFINISHED} after this long; the same command goes on from there",
    )
    group.add_argument("--num-layers", type=int, default=default.num_layers, help="layers of the drafter")
    group.add_argument(
        "--begin-with", metavar="DRAFTER", help="checkpoint folder whose weights to begin with (of the same shape)"
    )
    group.add_argument(
        "--target-layer-ids",
        type=_numbers,
        default=default.target_layer_ids,
        metavar="I,J,...",
        help="layers of the target whose output the drafter reads",
    )
    group.add_argument("--mask-token-id", type=int, default=default.mask_token_id, help="token that marks a draft slot")
    group.add_argument("--learning-rate", type=float, default=default.learning_rate, help="after the warm-up")
    group.add_argument("--weight-decay", type=float, default=default.weight_decay, help="of AdamW")
    group.add_argument(
        "--gamma", type=float, default=default.gamma, help="draft token k counts exp(-(k-1)/gamma) in the loss"
    )
    group.add_argument(
        "--validation-documents",
        type=int,
        default=default.validation_documents,
        help="held-out answers simulated at every save",
    )
    group.add_argument(
        "--seed", type=int, default=default.seed, help="of the split, the order, the anchors and the weights"
    )
