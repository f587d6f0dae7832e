"""What a step's output says of its drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dflash_serve.vllm_ext.scheduler import AdaptiveAsyncScheduler, AdaptiveScheduler, count_outcomes


def output(**sampled: list[int]) -> Any:
    """Of vLLM's ModelRunnerOutput, what is read."""
    return SimpleNamespace(
        sampled_token_ids=list(sampled.values()), req_id_to_index={name: i for i, name in enumerate(sampled)}
    )


def test_accepted_tokens_are_those_before_the_bonus_token() -> None:
    drafts = {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3]}
    outcomes, decoded = count_outcomes(drafts, output(a=[9], b=[1, 2, 9], c=[1, 2, 3, 9], d=[9]), None, 3)
    assert outcomes == {(3, 0): 1, (3, 2): 1, (3, 3): 1}
    assert decoded == 4


def test_a_prefill_chunk_gives_no_token_and_does_not_decode() -> None:
    assert count_outcomes({}, output(a=[]), None, 3) == ({}, 0)


def test_what_a_grammar_ruled_out_first_is_wrong_and_the_rest_unknown() -> None:
    outcomes, _ = count_outcomes({"a": [1, -1, -1], "b": [-1, -1, -1]}, output(a=[1, 9], b=[9]), {"a": 2, "b": 3}, 3)
    assert outcomes == {(2, 1): 1, (1, 0): 1}


def test_zeros_in_place_of_a_draft_say_nothing() -> None:
    """vLLM's V1 runner verifies as many zeros as the longest draft has, near the end of the context."""
    assert count_outcomes({"a": [0] * 7}, output(a=[9]), None, 3) == ({}, 1)


@pytest.mark.parametrize(("ahead", "kind"), [(False, AdaptiveScheduler), (True, AdaptiveAsyncScheduler)])
def test_the_scheduler_is_the_engines_kind(ahead: bool, kind: type) -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=ahead))
    assert type(AdaptiveScheduler.__new__(AdaptiveScheduler, config)) is kind
