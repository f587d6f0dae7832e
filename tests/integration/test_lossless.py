"""Speculation changes speed, not output: float32, greedy, served with DFlash against the engine without a drafter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_server import MODEL, Server
from dflash_serve import demo
from tests.integration.conftest import API_KEYS
from tests.integration.lossless import assert_same, in_a_process, prompts

pytestmark = pytest.mark.integration

MAX_TOKENS = 64


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


async def test_dflash_gives_the_autoregressive_output(server: Server, tmp_path: Path) -> None:
    with_dflash = await served(server)
    assert len(with_dflash) == 20
    assert sum(accepted for _, _, accepted in with_dflash) > 200, "speculation was hardly at work"
    request = {
        "model": str(demo.ensure_target()),
        "max_tokens": MAX_TOKENS,
        "prompts": [prompt for prompt, _, _ in with_dflash],
    }
    reference = in_a_process("tests.integration.autoregressive", request, tmp_path)["answers"]
    for (prompt, ours, _), theirs in zip(with_dflash, reference, strict=True):
        assert_same(prompt, ours, theirs)
