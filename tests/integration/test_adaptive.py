"""The draft length chosen at each step, in the real engine: output stays the target's, and bad drafts are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dflash_serve import demo
from tests.integration.bad_drafter import silent_drafter
from tests.integration.lossless import assert_same, in_a_process, prompts

pytestmark = pytest.mark.integration

MAX_TOKENS = 48
REGEX = r"(Yes|No), because [a-z ,]{10,120}\."
SYSTEM = "You are a helpful assistant. Keep to the question, use short words, and never repeat yourself. " * 5
"""More than three blocks of the KV cache, so that the prefix cache has something to find."""


def token_prompts() -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.ensure_target())
    return [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for prompt in prompts()[:12]
    ]


def request(drafter: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(demo.ensure_target()),
        "drafter": str(drafter),
        "max_tokens": MAX_TOKENS,
        "prompts": token_prompts(),
        **more,
    }


def test_whatever_is_chosen_the_output_is_the_targets(tmp_path: Path) -> None:
    """K drawn anew at each step: under preemption, from the prefix cache, with prefill and decoding in one batch, under
    a grammar, and beside requests that are aborted."""
    asked = request(demo.drafter_path(), regex=REGEX, random=True)
    ours = in_a_process("tests.integration.adaptive_engine", asked, tmp_path)
    theirs = in_a_process("tests.integration.autoregressive", asked, tmp_path)
    assert ours["preemptions"] > 0
    assert ours["cached_tokens"] > 0
    assert all(steps > 10 for steps in ours["report"]["steps_by_draft_tokens"].values())
    for way, reference in (("answers", "answers"), ("again", "answers"), ("regex", "regex")):
        for prompt, mine, other in zip(asked["prompts"], ours[way], theirs[reference], strict=True):
            assert_same(prompt, mine, other)
    assert len(ours["beside_aborted"]) == len(asked["prompts"]) // 2
    for index, mine in ours["beside_aborted"].items():
        assert_same(asked["prompts"][int(index)], mine, theirs["answers"][int(index)])
    # nothing that was preempted or aborted keeps its place in the KV cache
    assert ours["free_blocks"] == 19


def test_a_good_drafter_is_used_and_a_bad_one_is_left_out(tmp_path: Path) -> None:
    for name, drafter in (("good", demo.drafter_path()), ("bad", silent_drafter(tmp_path / "drafter"))):
        folder = tmp_path / name
        folder.mkdir()
        report = in_a_process("tests.integration.adaptive_engine", request(drafter, random=False), folder)["report"]
        print(name, report)
        steps = {int(count): number for count, number in report["steps_by_draft_tokens"].items()}
        without = steps.get(0, 0) / sum(steps.values())
        if name == "good":
            assert not report["unprofitable"]
            assert report["realised_tokens"] == pytest.approx(report["expected_tokens"], rel=0.15)
            assert without < 0.2
        else:
            assert report["unprofitable"]
            assert without > 0.7


def test_the_same_under_the_runner_and_the_scheduler_of_gpus(tmp_path: Path) -> None:
    """vLLM's V2 runner and asynchronous scheduling, its kernels interpreted: what GPUs run, CUDA graphs apart."""
    asked = request(demo.drafter_path())
    asked |= {"prompts": asked["prompts"][:3], "max_tokens": 40}
    ours = in_a_process("tests.integration.v2_engine", asked, tmp_path)
    theirs = in_a_process("tests.integration.autoregressive", asked, tmp_path)["answers"]
    assert (ours["scheduler"], ours["speculator"]) == ("AdaptiveAsyncScheduler", "SkippingSpeculator")
    assert ours["runner"] == "vllm.v1.worker.gpu.model_runner"
    for prompt, mine, other in zip(asked["prompts"], ours["answers"], theirs, strict=True):
        assert_same(prompt, mine, other)
    report = ours["report"]
    assert report["steps_by_draft_tokens"]["0"] > 0
    assert ours["drafts"] < ours["steps"]
    # drafts see their context after steps that left the drafter out
    assert report["realised_tokens"] > 1.3 * len(asked["prompts"]) * ours["steps"]
