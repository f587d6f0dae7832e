"""What a step's output says of its drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dflash_serve.vllm_ext.scheduler import (
    AdaptiveAsyncScheduler,
    AdaptiveScheduler,
    Scheduled,
    count_outcomes,
    count_prompts,
    decodes_alone,
)


def output(**sampled: list[int]) -> Any:
    """Of vLLM's ModelRunnerOutput, what is read."""
    return SimpleNamespace(
        sampled_token_ids=list(sampled.values()), req_id_to_index={name: i for i, name in enumerate(sampled)}
    )


def scheduled(tokens: list[int], drafts: int = 0) -> Any:
    """Of vLLM's SchedulerOutput, what is read: tokens by request, and how many requests have drafts."""
    names = [f"request-{index}" for index in range(len(tokens))]
    return SimpleNamespace(
        num_scheduled_tokens=dict(zip(names, tokens, strict=True)),
        total_num_scheduled_tokens=sum(tokens),
        scheduled_spec_decode_tokens={name: [1] for name in names[:drafts]},
        num_invalid_spec_tokens=None,
        num_spec_tokens_to_schedule=3,
    )


def test_a_step_decodes_alone_when_all_its_requests_verify_as_many() -> None:
    assert decodes_alone(scheduled([1, 1]), 0)
    assert decodes_alone(scheduled([4, 4], drafts=2), 3)
    assert not decodes_alone(scheduled([4, 1], drafts=1), 3)
    assert not decodes_alone(scheduled([4, 100], drafts=1), 3)
    assert not decodes_alone(scheduled([4], drafts=0), 3), "four tokens of a prompt"


def test_prompts_in_a_step_are_told_from_what_decodes() -> None:
    step = scheduled([4, 1, 100, 4, 28], drafts=2)
    sampled = output(**{f"request-{index}": tokens for index, tokens in enumerate([[9, 9], [9], [], [9], [9]])})
    assert count_prompts(step, sampled, 3) == (128, 1)
    assert count_prompts(scheduled([1, 1]), output(), 0) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "others", "counts"),
    [
        (AdaptiveScheduler, [True, True], [True, True, True]),
        (AdaptiveAsyncScheduler, [True, True], [True, True, True]),
        (AdaptiveAsyncScheduler, [False, True], [False, False, False]),
        (AdaptiveAsyncScheduler, [True, False], [True, False, False]),
    ],
)
def test_where_steps_overlap_one_beside_a_prefill_tells_no_cost(
    kind: type, others: list[bool], counts: list[bool]
) -> None:
    """A step, then two of which the next is launched before the one before it has ended."""
    scheduler: Any = object.__new__(kind)
    times: list[bool] = []
    scheduler.draft_length = SimpleNamespace(observe=lambda *args, **_: times.append(args[3] is not None))
    scheduler._last_output, scheduler._last_was_alone, scheduler.on_step = 0.0, True, None
    steps = {index: Scheduled(0.0, 3, alone) for index, alone in enumerate([True, *others])}
    scheduler._steps = dict(steps)
    for index, step in steps.items():
        # only the next one is on its way by then
        scheduler._steps = {index + 1: steps[index + 1]} if index + 1 in steps else {}
        scheduler._observe(scheduled([4], drafts=1), output(**{"request-0": [9]}), step)
    assert times == counts


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
