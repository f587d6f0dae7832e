"""What of a stream counts as output."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import test_utils, web

from dflash_serve.bench.client import Endpoint, ask, events, has_output, session


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


@pytest.mark.parametrize(("tokens", "timed"), [(5, False), (1, True)])
async def test_a_stream_that_shows_its_end_alone_tells_no_time_of_several_tokens(tokens: int, timed: bool) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        usage = {"prompt_tokens": 3, "completion_tokens": tokens}
        for event in (
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": ""}, "finish_reason": "length"}]},
            {"choices": [], "usage": usage},
        ):
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    async with test_utils.TestServer(app) as server, session() as http:
        found = await ask(http, Endpoint(str(server.make_url("/v1"))), [], "")
    assert (found.error, found.completion_tokens, found.gaps_seconds) == (None, tokens, [])
    assert (found.ttft_seconds is not None) == timed
