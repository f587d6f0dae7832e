import json
from typing import Any

import pytest
from gateway_client import CHAT, DONE, HELLO, SPECULATION, chat_chunk, serve, sse, usage_chunk
from starlette.responses import JSONResponse, PlainTextResponse

STREAM = {**HELLO, "stream": True}
STREAM_WITH_USAGE = {**STREAM, "stream_options": {"include_usage": True}}
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "h\u00e9 \U0001f600 </>"}}],
    "usage": {
        "prompt_tokens": 9,
        "total_tokens": 16,
        "completion_tokens": 7,
        "completion_tokens_details": {"reasoning_tokens": 3},
    },
    "metrics": {"speculative_decoding": SPECULATION},
}
DETAILS = {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 3}


async def test_speculation_goes_into_usage_and_a_header() -> None:
    served = serve(COMPLETION)
    reply = await served(json_body=HELLO)
    assert reply.headers["x-dflash-acceptance-length"] == "3.50"
    assert reply.headers["content-length"] == str(len(reply.body))
    expected = json.loads(json.dumps(COMPLETION))
    expected["usage"]["completion_tokens_details"] |= DETAILS
    assert reply.json() == expected
    record = served.record
    assert (record.prompt_tokens, record.completion_tokens) == (9, 7)
    assert (record.num_drafts, record.draft_tokens, record.accepted_tokens) == (2, 8, 5)
    assert record.acceptance_length == 3.5
    assert record.ttft_seconds is not None
    assert 0 < record.ttft_seconds <= record.duration_seconds
    assert (record.status, record.outcome, record.stream) == (200, "ok", False)


async def test_without_speculation_the_json_is_not_touched() -> None:
    answer = {**COMPLETION, "metrics": None}
    response = JSONResponse(answer)
    served = serve(response)
    reply = await served(json_body=HELLO)
    assert reply.body == response.body
    assert "x-dflash-acceptance-length" not in reply.headers
    assert (served.record.completion_tokens, served.record.acceptance_length) == (7, None)


async def test_nothing_verified_is_no_acceptance_length() -> None:
    nothing = {**SPECULATION, "num_spec_steps": 0, "num_accepted_draft_tokens": 0, "num_draft_tokens": 0}
    served = serve({**COMPLETION, "metrics": {"speculative_decoding": nothing}})
    reply = await served(json_body=HELLO)
    assert "x-dflash-acceptance-length" not in reply.headers
    assert reply.json()["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0
    assert served.record.num_drafts == 0


@pytest.mark.parametrize(
    "answer",
    [
        JSONResponse(None),
        JSONResponse([1]),
        JSONResponse({"usage": 3, "metrics": "x"}),
        JSONResponse(
            {"usage": {"prompt_tokens": "x"}, "metrics": {"speculative_decoding": {"num_draft_tokens": None}}}
        ),
        PlainTextResponse("text"),
        PlainTextResponse("not json", media_type="application/json"),
    ],
)
async def test_what_is_not_understood_passes(answer: JSONResponse) -> None:
    served = serve(answer)
    reply = await served(json_body=HELLO)
    assert (reply.status, reply.body) == (200, answer.body)
    assert served.record.completion_tokens is None


async def test_a_lone_surrogate_stays_valid_json() -> None:
    text = json.dumps({**COMPLETION, "choices": "\ud800"})
    reply = await serve(PlainTextResponse(text, media_type="application/json"))(json_body=HELLO)
    assert reply.json()["choices"] == "\ud800"


async def test_a_stream_passes_chunk_by_chunk_and_unchanged() -> None:
    chunks = [chat_chunk(text) for text in ("", "a", "usage", '"choices":[]', 'data: {"error": 1}\n\n', "event: error")]
    served = serve([*chunks, DONE])
    reply = await served(json_body=STREAM)
    assert [chunk for chunk in reply.chunks if chunk] == [*chunks, DONE]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (served.record.outcome, served.record.stream) == ("ok", True)


async def test_usage_that_the_client_did_not_ask_for_is_hidden_and_recorded() -> None:
    served = serve([chat_chunk("a"), usage_chunk(), DONE])
    reply = await served(json_body=STREAM)
    assert served.inner.seen_json["stream_options"]["include_usage"] is True
    assert [chunk for chunk in reply.chunks if chunk] == [chat_chunk("a"), DONE]
    record = served.record
    assert (record.prompt_tokens, record.completion_tokens, record.acceptance_length) == (9, 7, 3.5)


async def test_usage_that_the_client_asked_for_carries_speculation() -> None:
    served = serve([chat_chunk("a"), usage_chunk(), DONE])
    reply = await served(json_body=STREAM_WITH_USAGE)
    first, usage, end = reply.events()
    assert (first["choices"][0]["delta"]["content"], end) == ("a", "[DONE]")
    assert usage["usage"]["completion_tokens_details"] == DETAILS
    assert usage["metrics"] == {"speculative_decoding": SPECULATION}
    assert served.record.acceptance_length == 3.5


async def test_usage_without_speculation_is_not_touched() -> None:
    """More than one sequence: vLLM cannot say whose the speculation was."""
    served = serve([chat_chunk("a"), usage_chunk(None), DONE])
    reply = await served(json_body={**STREAM_WITH_USAGE, "n": 2})
    assert usage_chunk(None) in reply.chunks
    assert (served.record.completion_tokens, served.record.acceptance_length) == (7, None)


async def test_a_running_count_is_left_to_the_client() -> None:
    counted = json.loads(chat_chunk("a")[6:]) | {"usage": {"prompt_tokens": 9, "completion_tokens": 1}}
    options = {"include_usage": True, "continuous_usage_stats": True}
    served = serve([sse(counted), usage_chunk(), DONE])
    reply = await served(json_body={**STREAM, "stream_options": options})
    assert served.inner.seen_json["stream_options"] == options
    assert reply.chunks[0] == sse(counted)
    assert served.record.completion_tokens == 7


WHOLE = b"".join([chat_chunk("a"), chat_chunk("b\u00e9"), usage_chunk(), DONE])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 200, 333, len(WHOLE) - 1, len(WHOLE)])
async def test_events_may_be_cut_and_joined_anywhere(size: int) -> None:
    chunks = [WHOLE[start : start + size] for start in range(0, len(WHOLE), size)]
    served = serve(chunks)
    assert (await served(json_body=STREAM)).body == WHOLE.replace(usage_chunk(), b"")
    assert served.record.completion_tokens == 7
    served = serve(chunks)
    events = (await served(json_body=STREAM_WITH_USAGE)).events()
    assert [len(events), events[2]["usage"]["completion_tokens_details"]] == [4, DETAILS]


async def test_the_rest_of_a_stream_that_ends_in_mid_event_is_sent() -> None:
    reply = await serve([chat_chunk("a"), b"data: x"])(json_body=STREAM)
    assert reply.body == chat_chunk("a") + b"data: x"
    assert reply.complete


async def test_comments_keep_alive_and_are_no_first_token() -> None:
    served = serve([b": keep-alive\n\n"])
    reply = await served(json_body=STREAM)
    assert reply.body == b": keep-alive\n\n"
    assert served.record.ttft_seconds is None
    served = serve([b": keep-alive\n\n", chat_chunk("a"), DONE])
    assert (await served(json_body=STREAM)).body == b": keep-alive\n\n" + chat_chunk("a") + DONE
    assert served.record.ttft_seconds is not None


async def test_responses_api() -> None:
    usage = {"input_tokens": 20, "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 0}}
    served = serve({"id": "resp_1", "usage": usage})
    reply = await served(path="/v1/responses", json_body={"model": "demo", "input": "a"})
    assert reply.json()["usage"] == usage
    assert (served.record.prompt_tokens, served.record.completion_tokens) == (20, 5)


async def test_responses_api_streamed() -> None:
    created = sse({"type": "response.created", "response": {"usage": None}}, "response.created")
    completed = sse(
        {"type": "response.completed", "response": {"usage": {"input_tokens": 20, "output_tokens": 5}}},
        "response.completed",
    )
    delta = sse({"delta": "event: response.completed\ndata: {} event: error"}, "response.output_text.delta")
    body = {"model": "demo", "input": "a", "stream": True}

    served = serve([created])
    await served(path="/v1/responses", json_body=body)
    assert served.record.ttft_seconds is None  # it was made before the model ran

    served = serve([created, delta, completed])
    reply = await served(path="/v1/responses", json_body=body)
    assert reply.body == created + delta + completed
    assert (served.record.prompt_tokens, served.record.completion_tokens) == (20, 5)
    assert served.record.ttft_seconds is not None
    assert served.record.outcome == "ok"
    assert "stream_options" not in served.inner.seen_json


async def test_messages_api_streamed() -> None:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 17, "output_tokens": 5}
    events = [
        sse({"type": "message_start", "message": {"usage": {"input_tokens": 20, "output_tokens": 0}}}, "message_start"),
        sse({"delta": {"text": "event: message_delta"}}, "content_block_delta"),
        sse({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}, "message_delta"),
        sse({"type": "message_stop"}, "message_stop"),
    ]
    served = serve(events)
    reply = await served(path="/v1/messages", json_body=STREAM)
    assert reply.body == b"".join(events)
    assert (served.record.prompt_tokens, served.record.completion_tokens) == (20, 5)
    assert served.record.ttft_seconds is not None


async def test_routes_without_generation_pass_as_they_are() -> None:
    answer = {"usage": {"prompt_tokens": 1}, "metrics": {"speculative_decoding": SPECULATION}}
    served = serve(answer)
    reply = await served(path="/v1/messages/count_tokens", json_body=HELLO)
    assert reply.json() == answer
    assert (served.record.prompt_tokens, served.record.ttft_seconds) == (None, None)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_the_start_of_a_stream_is_sent_at_once(path: str) -> None:
    """Not held for the first chunk, as an error's is for its body."""
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        order.append("started")
        await send({"type": "http.response.body", "body": chat_chunk("a"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    served = serve(app)
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        assert len(order) == (message["type"] != "http.response.start")

    incoming = [{"type": "http.request", "body": json.dumps(STREAM).encode(), "more_body": False}]

    async def receive() -> Any:
        return incoming.pop()

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
    }
    await served.gateway(scope, receive, send)
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
