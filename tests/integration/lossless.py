"""What "the same output" means: token for token, unless the target itself was undecided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.local_server import ROOT
from dflash_serve import demo
from dflash_serve.vllm_ext.openmp import preload_intel_openmp

TIE = 1e-3
"""Two best logits closer than this may change places by rounding alone."""

MORE_PROMPTS = [
    "List the planets of the solar system.",
    "Translate to French: Good morning, my friend.",
    "What is 17 + 26? Explain.",
    "Write a haiku about the sea.",
    "Write a SQL query that counts users by country.",
    "Why do leaves fall in autumn?",
    "Name five fruits and their colours.",
    "Write a JavaScript function that reverses a string.",
]


def prompts() -> list[str]:
    lines = (ROOT / "dflash_serve" / "bench" / "prompts.jsonl").read_text().strip().split("\n")
    return [json.loads(line)["prompt"] for line in lines] + MORE_PROMPTS


def in_a_process(module: str, request: dict[str, Any], folder: Path) -> Any:
    """What `python -m MODULE REQUEST.json ANSWER.json` writes: an engine in a process of its own."""
    name = module.rpartition(".")[2]
    asked, answered = folder / f"{name}-request.json", folder / f"{name}-answer.json"
    asked.write_text(json.dumps(request))
    variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    preload_intel_openmp(variables)
    command = [sys.executable, "-m", module, str(asked), str(answered)]
    subprocess.run(command, check=True, cwd=ROOT, env=variables, timeout=400)
    return json.loads(answered.read_text())


def assert_same(prompt: list[int], ours: list[int], theirs: list[int]) -> None:
    """Fails where they differ, unless the two best logits were closer than TIE there; says so then."""
    if ours == theirs:
        return
    at = next(i for i, (a, b) in enumerate(zip([*ours, -1], [*theirs, -1], strict=False)) if a != b)
    gap = gap_of_best_two(prompt + theirs[:at])
    assert gap < TIE, f"token {at} differs ({ours[at : at + 1]} for {theirs[at : at + 1]}) and was no tie: {gap}"
    print(f"a tie at token {at}: the two best logits are {gap:.1e} apart")


def gap_of_best_two(context: list[int]) -> float:
    """How far apart the target's two best logits are after `context`, in transformers, float32."""
    import torch

    with torch.no_grad():
        best = _target()(torch.tensor([context])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


@cache
def _target() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.ensure_target(), dtype=torch.float32)
