"""`dflash-serve bench` with Gemma-4-31B's shape on one GPU: dummy weights, the model card's acceptance lengths.

    python -m benchmarks.gemma4_bench speed --out FOLDER --data PROMPTS [--tasks mt_bench,gsm8k]
    python -m benchmarks.gemma4_bench overhead --out FOLDER [--interleave] [--engine-steps]

speed: AR, K = 15 and adaptive at 1, 8, 32, 64 and 128 requests. overhead: `vllm serve`, `up --plain` and `up` at 1, 8,
32 and 128, without a drafter: that sends the most chunks a second. Works from a checkout that is not installed. A start
takes some 170 s; speed starts 1 + 2 x tasks servers a round, overhead --interleave two in all: `vllm serve` and `up`,
which an H200 holds at once with 32 requests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import yaml

from benchmarks import engine_steps
from benchmarks.gemma4_gpu import plugin_path, settings_args
from dflash_serve.bench.servers import COMMAND

MOST_AT_ONCE = 128
CONCURRENCY = {"speed": [1, 8, 32, 64, 128], "overhead": [1, 8, 32, 128], "overhead --interleave": [1, 8, 32]}
SAMPLES = {"speed": 4, "overhead": 32}
ENGINE = {"max_model_len": 8192}
SHARED_GPU = {"max_model_len": 2048, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.485}
"""Engine settings of each of two sides on one GPU: 57 GiB of weights and some 8 for the KV cache on an H200."""


def numbers(text: str) -> list[int]:
    """`1,8` -> [1, 8]."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "overhead"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of <task>.jsonl")
    parser.add_argument("--tasks", default="math500,gsm8k,humaneval,mbpp,mt_bench")
    parser.add_argument("--sides", default="ar,k=15,adaptive", help="of speed")
    parser.add_argument(
        "--samples",
        type=int,
        help="speed: conversations a task (4); overhead: requests of a concurrency, at least (32)",
    )
    parser.add_argument("--fronts", help="sides of overhead: vllm,plain,up; vllm,up with --interleave")
    parser.add_argument("--profile", default="gemma4-31b-h200")
    parser.add_argument("--max-tokens", type=int, help="of an answer (speed: 256, overhead: 128)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--concurrency", type=numbers, help="; ".join(f"{k}: {v}" for k, v in CONCURRENCY.items()))
    parser.add_argument("--interleave", action="store_true", help="of overhead: as `bench overhead` has it")
    parser.add_argument("--engine-steps", action="store_true", help="of overhead: where the engines' time goes, too")
    options = parser.parse_args()
    if (options.engine_steps or options.interleave) and options.part != "overhead":
        parser.error("--engine-steps and --interleave go with overhead")
    fronts = options.fronts or ("vllm,up" if options.interleave else "vllm,plain,up")
    if options.interleave and len(fronts.split(",")) > 2:
        parser.error("--interleave: the GPU's memory holds two of the --fronts")
    concurrency = options.concurrency or CONCURRENCY[options.part + (" --interleave" if options.interleave else "")]
    most = max(concurrency) if options.interleave else max(MOST_AT_ONCE, *concurrency)
    folder = options.out.resolve()
    steps = folder / "engine-steps"
    args = settings_args(folder / "models", profile=options.profile, tiny=False)
    # the profile lets 64 run at once
    args["engine"] |= {"max_num_seqs": most} | (SHARED_GPU if options.interleave else ENGINE)
    args["limits"] = {"max_concurrent_requests": most}
    if options.part == "overhead":
        args["speculation"] = {"mode": "off"}
    if options.engine_steps:
        engine_steps.prepare(steps)
        args["engine"] |= engine_steps.ENGINE
    settings = folder / "gemma4-shapes.yaml"
    settings.write_text(yaml.safe_dump(args))
    command = [*COMMAND, "bench"]
    if options.part == "speed":
        command += ["run", "--pair", "--sides", options.sides, "--tasks", options.tasks]
        command += ["--data", str(options.data)] if options.data else []
    else:
        command += ["overhead", "--sides", fronts, *(["--interleave"] if options.interleave else [])]
    samples = options.samples or SAMPLES[options.part]
    command += ["--concurrency", ",".join(map(str, concurrency)), "--samples", str(samples)]
    command += [
        "--synthetic",
        "--settings",
        str(settings),
        "--max-tokens",
        str(options.max_tokens or (256 if options.part == "speed" else 128)),
    ]
    command += ["--rounds", str(options.rounds), "--out", str(folder / f"gemma4-{options.part}")]
    variables = {"PYTHONPATH": plugin_path(folder), engine_steps.VARIABLE: str(steps)}
    subprocess.run(command, env=os.environ | variables, check=True)
    if options.engine_steps:
        engine_steps.show(steps)


if __name__ == "__main__":
    main()
