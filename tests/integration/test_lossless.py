"""Speculation changes speed, not output: float32, greedy, served with DFlash against the engine without a drafter."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_server import MODEL, ROOT, Server
from dflash_serve import demo
from tests.integration.conftest import API_KEYS

pytestmark = pytest.mark.integration

MAX_TOKENS = 64
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


async def served(server: Server) -> list[tuple[list[int], list[int], int]]:
    """(prompt tokens, output tokens, accepted draft tokens) of each prompt; four at once, so that batches are mixed."""
    client = server.async_client(API_KEYS[0])
    room = asyncio.Semaphore(4)

    async def ask(prompt: str) -> tuple[list[int], list[int], int]:
        async with room:
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=MAX_TOKENS,
                extra_body={"return_token_ids": True},
            )
        raw: Any = answer.model_dump()
        accepted = raw["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
        return raw["prompt_token_ids"], raw["choices"][0]["token_ids"], accepted

    return list(await asyncio.gather(*map(ask, prompts())))


def autoregressive(token_prompts: list[list[int]], folder: Path) -> list[list[int]]:
    request = {"model": str(demo.ensure_target()), "max_tokens": MAX_TOKENS, "prompts": token_prompts}
    (folder / "requests.json").write_text(json.dumps(request))
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-m", "tests.integration.autoregressive"]
    subprocess.run(
        [*command, str(folder / "requests.json"), str(folder / "answers.json")],
        check=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    answers: list[list[int]] = json.loads((folder / "answers.json").read_text())
    return answers


def gap_of_best_two(context: list[int]) -> float:
    """How far apart the target's two best logits are after `context`, in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.ensure_target(), dtype=torch.float32)
    with torch.no_grad():
        best = model(torch.tensor([context])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


async def test_dflash_gives_the_autoregressive_output(server: Server, tmp_path: Path) -> None:
    with_dflash = await served(server)
    assert len(with_dflash) == 20
    assert sum(accepted for _, _, accepted in with_dflash) > 200, "speculation was hardly at work"
    reference = autoregressive([prompt for prompt, _, _ in with_dflash], tmp_path)
    for (prompt, ours, _), theirs in zip(with_dflash, reference, strict=True):
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip([*ours, -1], [*theirs, -1], strict=False)) if a != b)
        gap = gap_of_best_two(prompt + theirs[:at])
        assert gap < TIE, f"token {at} differs ({ours[at : at + 1]} for {theirs[at : at + 1]}) and was no tie: {gap}"
        print(f"a tie at token {at}: the two best logits are {gap:.1e} apart")
