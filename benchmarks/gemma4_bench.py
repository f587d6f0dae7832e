"""`dflash-serve bench` with Gemma-4-31B's shape on one GPU: dummy weights, the model card's acceptance lengths.

    python -m benchmarks.gemma4_bench speed --out FOLDER --data PROMPTS [--tasks mt_bench,gsm8k]
    python -m benchmarks.gemma4_bench overhead --out FOLDER

speed: AR, K = 15 and adaptive at 1, 8, 32, 64 and 128 requests. overhead: `vllm serve`, `up --plain` and `up` at 1, 8,
32 and 128, without a drafter: that sends the most chunks a second. Works from a checkout that is not installed. A start
takes some 170 s; speed starts 1 + 2 x tasks servers a round, overhead --together (two sides, at most 32 at once on an
H200) two in all.
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
CONCURRENCY = {"speed": "1,8,32,64,128", "overhead": "1,8,32,128"}
SAMPLES = {"speed": 4, "overhead": 32}
ENGINE = {"max_model_len": 8192}
TOGETHER = {"max_model_len": 2048, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.485}
"""Engine settings of each of two sides on one GPU: 57 GiB of weights and some 8 for the KV cache on an H200."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "overhead"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of <task>.jsonl")
    parser.add_argument("--tasks", default="math500,gsm8k,humaneval,mbpp,mt_bench")
    parser.add_argument("--sides", default="ar,k=15,adaptive", help="of speed")
    parser.add_argument("--samples", type=int, help="speed: of a task, 4; overhead: at least, 32")
    parser.add_argument("--fronts", help="sides of overhead: vllm,plain,up; vllm,up with --together")
    parser.add_argument("--profile", default="gemma4-31b-h200")
    parser.add_argument("--max-tokens", type=int, help="of an answer (speed: 256, overhead: 128)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--concurrency", help=" or ".join(CONCURRENCY.values()))
    parser.add_argument("--together", action="store_true", help="of overhead: both sides take turns; see there")
    parser.add_argument("--engine-steps", action="store_true", help="of overhead: where the engines' time goes, too")
    options = parser.parse_args()
    if (options.engine_steps or options.together) and options.part != "overhead":
        parser.error("--engine-steps and --together go with overhead")
    fronts = options.fronts or ("vllm,up" if options.together else "vllm,plain,up")
    if options.together and len(fronts.split(",")) > 2:
        parser.error("--together: the GPU's memory holds two of the --fronts")
    concurrency = options.concurrency or CONCURRENCY[options.part]
    most = max(map(int, concurrency.split(","))) if options.together else MOST_AT_ONCE
    folder = options.out.resolve()
    steps = folder / "engine-steps"
    args = settings_args(folder / "models", profile=options.profile, tiny=False)
    # the profile lets 64 run at once
    args["engine"] |= {"max_num_seqs": most} | (TOGETHER if options.together else ENGINE)
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
        command += ["overhead", "--sides", fronts, *(["--together"] if options.together else [])]
    samples = options.samples or SAMPLES[options.part]
    command += ["--concurrency", concurrency, "--samples", str(samples)]
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
