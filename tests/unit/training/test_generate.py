from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from dflash_serve.training import generate
from dflash_serve.training.generate import CachePool, greedy
from dflash_serve.training.target import Target

END = 46


def hugging_face(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt])
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def expected(llama: tuple[LlamaForCausalLM, Path]) -> dict[tuple[int, ...], list[int]]:
    """Prompts and what transformers answers."""
    torch.manual_seed(3)
    prompts = [torch.randint(64, (n,)).tolist() for n in (1, 30, 4, 17, 16, 2, 9, 23, 5, 33, 12, 6)]
    return {tuple(prompt): hugging_face(llama[0], prompt, 40) for prompt in prompts}


@pytest.mark.parametrize("batch_size", [3, 64])
def test_answers_are_those_of_transformers(
    target: Target, expected: dict[tuple[int, ...], list[int]], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 48)  # several prefill passes a batch
    monkeypatch.setattr(generate, "COMPACT_BELOW", 1.0)  # finished sequences leave whenever it looks
    prompts = [list(prompt) for prompt in expected]
    answers, times = greedy(
        target,
        prompts,
        max_new_tokens=40,
        end_tokens=[END],
        pool=CachePool(target, 12 * 256),
        batch_size=batch_size,
    )
    assert [a.tolist() for a in answers.tokens] == list(expected.values())
    assert answers.finished == [answer[-1] == END for answer in expected.values()]
    assert 0 < sum(answers.finished) < len(prompts), "the example must hold finished and cut answers"
    assert times.tokens == sum(map(len, expected.values()))


def test_a_batch_stops_when_enough_have_finished(target: Target) -> None:
    torch.manual_seed(3)
    prompts = [torch.randint(64, (n,)).tolist() for n in range(1, 33)]
    pool = CachePool(target, 32 * 256)

    def answer(stop_fraction: float) -> list[np.ndarray]:
        answers, _ = greedy(
            target,
            prompts,
            max_new_tokens=200,
            end_tokens=[END],
            pool=pool,
            batch_size=32,
            stop_fraction=stop_fraction,
        )
        return answers.tokens

    whole, cut = answer(1.0), answer(0.1)
    assert max(map(len, cut)) < max(map(len, whole))
    for a, b in zip(whole, cut, strict=True):
        assert b.tolist() == a[: len(b)].tolist()


def test_a_cache_too_small_for_one_sequence_is_an_error(target: Target) -> None:
    with pytest.raises(ValueError, match="cannot hold one sequence"):
        greedy(target, [[1, 2]], max_new_tokens=60, end_tokens=[END], pool=CachePool(target, 32), batch_size=1)
