"""`dflash-serve bench overhead` on a machine without a GPU, at the pace of one.

    python -m benchmarks.front_end_paced --out FOLDER/NAME [--rounds 3] [--sides vllm,plain,up] [--busy-prefill]
        [--engine-steps] [--interleave]

The engine is vLLM's but for the model, whose steps take what Gemma-4-31B's without a drafter take on an H200
(`benchmarks.paced_engine`) and leave the CPU to the rest. Gemma-4's parsers are on, as in its profile. With
`--busy-prefill` a step that reads a prompt keeps the CPU busy with the same work on every side, some 40 ms: whether one
side's engine is slower at it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from benchmarks import engine_steps
from benchmarks.gemma4_gpu import python_path, settings_args
from benchmarks.gemma4_shapes import write_tokenizer
from benchmarks.pace import BUSY_VARIABLE, PACE
from dflash_serve.bench.report import Report, write
from dflash_serve.bench.servers import COMMAND

PLATFORM = {"vllm.platform_plugins": {"dflash_serve": "benchmarks.paced_platform:plugin"}}
"""Under the name of our own plugin, which `vllm serve` is told to load."""
CONCURRENCY = "1,8,32,128"
MOST_AT_ONCE = 128
VOCABULARY_SIZE = 20000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="reports are written here, with .json, .md, ...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="vllm,plain,up")
    parser.add_argument("--concurrency", help=f"{CONCURRENCY}; 1 with --busy-prefill")
    parser.add_argument("--samples", type=int, default=32, help="requests of a concurrency, at least")
    parser.add_argument("--spread", type=float, default=0.5, help="0: answers of one length, in bursts")
    parser.add_argument("--busy-prefill", action="store_true", help="reading a prompt keeps the CPU busy")
    parser.add_argument("--interleave", action="store_true", help="as `bench overhead` has it")
    parser.add_argument("--engine-steps", action="store_true", help="where the engines' time goes, too: NAME-steps")
    options = parser.parse_args()
    concurrency = options.concurrency or ("1" if options.busy_prefill else CONCURRENCY)
    if options.busy_prefill and concurrency != "1":
        parser.error("--busy-prefill takes as long for one prompt as for many: --concurrency 1 alone")
    out = options.out.resolve()
    steps = out.with_name(f"{out.name}-steps")
    if options.engine_steps:
        engine_steps.prepare(steps)
    with tempfile.TemporaryDirectory(prefix="paced-") as name:
        folder = Path(name)
        settings = write_settings(folder, engine_steps.ENGINE if options.engine_steps else {})
        command = [*COMMAND, "bench", "overhead", "--settings", str(settings), "--max-tokens", "64"]
        command += ["--sides", options.sides, "--concurrency", concurrency, "--samples", str(options.samples)]
        command += ["--rounds", str(options.rounds), "--spread", str(options.spread), "--out", str(out)]
        command += ["--interleave"] if options.interleave else []
        variables = {
            "PYTHONPATH": python_path(folder, "paced-engine", "0", PLATFORM),
            engine_steps.VARIABLE: str(steps),
        }
        if options.busy_prefill:
            variables[BUSY_VARIABLE] = "1"
        subprocess.run(command, env=os.environ | variables, check=True)
    reading = "; reading a prompt keeps the CPU busy" if options.busy_prefill else ""
    report = Report.read(out.with_suffix(".json"))
    about = report.about | {
        "engine": f"no model; steps of the surface {PACE}, slept through{reading}",
        "settings": "Gemma-4's",
    }
    write(replace(report, about=about), out)
    if options.engine_steps:
        engine_steps.show(steps)


def write_settings(folder: Path, engine: Mapping[str, str]) -> Path:
    """A tiny model that is loaded and never asked, with as many words as prompts need, and the settings around it."""
    args = settings_args(folder / "models", profile="smollm2-cpu", tiny=True)
    target = Path(args["target"])
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY_SIZE}))
    write_tokenizer(target, VOCABULARY_SIZE)
    args["engine"] |= {
        "load_format": "dummy",
        "max_num_seqs": MOST_AT_ONCE,
        "max_num_batched_tokens": 8192,
        "enforce_eager": True,
        **engine,
    }
    args |= {"speculation": {"mode": "off"}, "limits": {"max_concurrent_requests": MOST_AT_ONCE}}
    path = folder / "paced.yaml"
    path.write_text(yaml.safe_dump(args))
    return path


if __name__ == "__main__":
    main()
