"""The engine without a model: when a request's prompt is read, and how long a step takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.paced_engine import Lengths, step_seconds
from dflash_serve.speculation.step_cost import load


def scheduled(new: dict[str, tuple[int, int]], cached: dict[str, int], tokens: dict[str, int], done: Any = ()) -> Any:
    """As vLLM's scheduler gives it: prompt and computed tokens of new requests, computed ones of the others."""
    return SimpleNamespace(
        finished_req_ids=set(done),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, prompt_token_ids=[7] * prompt, num_computed_tokens=computed)
            for name, (prompt, computed) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
        num_scheduled_tokens=tokens,
    )


def test_a_request_answers_from_the_step_on_that_ends_its_prompt() -> None:
    lengths = Lengths()
    assert lengths.answered(scheduled({"a": (10, 0), "b": (30, 0)}, {}, {"a": 10, "b": 20})) == {"a": True, "b": False}
    assert lengths.answered(scheduled({}, {"a": 10, "b": 20}, {"b": 10, "a": 1})) == {"b": True, "a": True}
    # a prefix that was cached counts as read; what is over is forgotten
    assert lengths.answered(scheduled({"c": (50, 40)}, {}, {"c": 10}, done=["a", "b"])) == {"c": True}
    assert list(lengths._prompts) == ["c"]


def test_a_step_takes_what_the_surface_says_and_prompts_by_their_tokens() -> None:
    costs = load("gemma4-31b-h200")
    assert step_seconds(costs, 32, 32) == costs.step_seconds(32, 0)
    assert step_seconds(costs, 2, 1001) - step_seconds(costs, 2, 2) == pytest.approx(999 * costs.token_seconds)
