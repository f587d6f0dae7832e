"""What of a stream counts as output."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from dflash_serve.bench.client import events, has_output


async def test_events_may_be_cut_anywhere() -> None:
    stream = b': ping\n\ndata: {"a": "\xc3\xa9"}\n\ndata: {"b": 2}\r\n\r\ndata: [DONE]\n\n'

    async def chunks(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    for size in (1, 3, 20, len(stream)):
        assert [event async for event in events(chunks(size))] == ['{"a": "é"}'.encode(), b'{"b": 2}']


@pytest.mark.parametrize(
    ("choice", "output"),
    [
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"content": "Hi"}}, True),
        ({"delta": {"reasoning": "Hm"}}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}}, True),
        ({"delta": {"content": ""}}, True),
        ({"delta": {"content": "!"}, "finish_reason": "stop"}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
    ],
)
def test_output_is_text_or_a_token_without_text(choice: dict[str, object], output: bool) -> None:
    assert has_output(choice, first=False) == output


def test_an_answer_that_ends_with_its_first_token_has_output() -> None:
    assert has_output({"delta": {"content": ""}, "finish_reason": "stop"}, first=True)
    assert not has_output({"delta": {"role": "assistant", "content": ""}}, first=True)
