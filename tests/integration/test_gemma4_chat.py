"""Thinking, separate reasoning text and tool calls, as the Gemma-4 profiles set them up, through the OpenAI SDK.

The engine, its parsers and the gateway are the real ones; the target is tiny and has learnt its answers by heart, in
the control tokens that Gemma-4 writes. Its drafter is random: what it drafts is refused, and nothing else comes of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from benchmarks.gemma4_shapes import write_pair
from benchmarks.local_server import serving
from dflash_serve.settings import Cluster, resolve
from tests.integration.learnt import Conversation, teach

pytestmark = pytest.mark.integration

MODEL = "gemma-4-tiny"
SUM, WEATHER = "What is 2+2?", "Weather in Oslo?"
ADDED, LOOKED_UP = "Two and two.", "Look it up."
CALL = ["<|tool_call>", "call:get_weather{city:", '<|"|>', "Oslo", '<|"|>', ",days:2}", "<tool_call|>"]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of the next days.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}


def thought(text: str) -> list[str]:
    return ["<|channel>", "thought\n", text, "<channel|>"]


CONVERSATIONS = [
    Conversation(SUM, ["It is four."]),
    Conversation(SUM, [*thought(ADDED), "It is four."], thinking=True),
    Conversation(WEATHER, CALL, tools=TOOLS),
    Conversation(WEATHER, [*thought(LOOKED_UP), *CALL], thinking=True, tools=TOOLS),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    target, drafter = write_pair(tmp_path_factory.mktemp("gemma"), tiny=True)
    teach(target, CONVERSATIONS)
    profile = resolve({"profile": "gemma4-31b-b300"}, Cluster(cpus=0, gpus={}), read_config=lambda _: None).settings
    chat = ("reasoning_parser", "tool_call_parser", "enable_auto_tool_choice")
    args = {
        "profile": "smollm2-cpu",
        "model_id": MODEL,
        "target": str(target),
        "drafter": str(drafter),
        "engine": {name: profile.engine[name] for name in chat} | {"max_model_len": 512},
    }
    with serving(tmp_path_factory.mktemp("gemma-server"), args) as server:
        yield server.client()


def test_reasoning_is_apart_from_the_answer(client: openai.OpenAI) -> None:
    message = ask(client, SUM, extra_body=THINKING).choices[0].message
    assert message.content == "It is four."
    assert reasoning(message) == ADDED


def test_without_thinking_there_is_none(client: openai.OpenAI) -> None:
    answer = ask(client, SUM)
    assert answer.choices[0].message.content == "It is four."
    assert not reasoning(answer.choices[0].message)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("thinking", [False, True])
def test_a_tool_is_called(client: openai.OpenAI, thinking: bool) -> None:
    answer = ask(client, WEATHER, tools=TOOLS, extra_body=THINKING if thinking else {})
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
    assert not choice.message.content
    assert (reasoning(choice.message) or "") == (LOOKED_UP if thinking else "")


def test_streams_bring_thought_and_call_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(ask(client, WEATHER, tools=TOOLS, extra_body=THINKING, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(reasoning(delta) or "" for delta in deltas) == LOOKED_UP
    assert "".join(call.name or "" for call in calls) == "get_weather"
    assert json.loads("".join(call.arguments or "" for call in calls)) == {"city": "Oslo", "days": 2}
    assert not "".join(delta.content or "" for delta in deltas), "no control token among the text"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"


def ask(client: openai.OpenAI, question: str, **options: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=64, **options)


def reasoning(message: Any) -> str | None:
    """vLLM's field beside `content`, which the SDK passes on."""
    found: str | None = getattr(message, "reasoning", None)
    return found
