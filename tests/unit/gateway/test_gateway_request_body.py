import json
import sys
from typing import Any

import pytest
from gateway_client import CHAT, HELLO, serve

from dflash_serve.gateway.request_body import MAX_JSON_DEPTH, count_prompts, with_usage
from dflash_serve.gateway.routes import ROUTES

ROUTE = {route.template: route for route in ROUTES}


async def test_a_body_within_the_limits_is_not_touched() -> None:
    served = serve(max_output_tokens=100)
    text = b' { "model":"demo",  "messages":[{"role":"user","content":"h\xc3\xa9"}], "max_tokens": 100, "n": null }\n'
    reply = await served(chunks=[text[:7], text[7:30], text[30:]], headers={"content-type": "Application/JSON; x=y"})
    assert reply.status == 200
    assert served.inner.requests[0][2] == text


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)])
async def test_a_large_body_is_refused_by_its_declared_length(size: int, status: int) -> None:
    served = serve(max_body_bytes=1000)
    text = json.dumps(HELLO).encode()
    text += b" " * (size - len(text))
    headers = {"content-type": "application/json", "content-length": str(size)}
    reply = await served(chunks=[text], headers=headers)
    assert reply.status == status
    if status == 413:
        assert "1000 bytes" in reply.error["message"]


async def test_a_declared_length_is_refused_before_the_body_comes() -> None:
    reply = await serve(max_body_bytes=1000)(json_body=HELLO, headers={"content-length": "1001"})
    assert reply.status == 413


async def test_a_large_body_without_a_length_is_refused_while_it_comes() -> None:
    served = serve(max_body_bytes=1000)
    reply = await served(chunks=[b"x" * 400] * 3, headers={"content-type": "application/json"})
    assert reply.status == 413
    assert served.inner.requests == []


async def test_a_length_that_lies_does_not_help() -> None:
    headers = {"content-type": "application/json", "content-length": "10"}
    assert (await serve(max_body_bytes=1000)(chunks=[b"x" * 1001], headers=headers)).status == 413


@pytest.mark.parametrize("length", ["-1", "x", "1e3", ""])
async def test_a_length_that_is_none(length: str) -> None:
    reply = await serve()(json_body=HELLO, headers={"content-length": length})
    assert reply.status == 400


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a":1}{',
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'\xff\xfe{"a":1}',
        json.dumps(HELLO).encode("utf-16"),
        b'\xef\xbb\xbf{"a":1}',
        b'{"n":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
async def test_bad_json(text: bytes) -> None:
    served = serve()
    reply = await served(chunks=[text], headers={"content-type": "application/json"})
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert "Traceback" not in reply.body.decode()
    assert served.inner.requests == []


@pytest.mark.parametrize("value", [[], "text", 1, True])
async def test_json_that_is_no_object(value: object) -> None:
    reply = await serve()(json_body=value)
    assert (reply.status, "object" in reply.error["message"]) == (400, True)


def nested(depth: int) -> dict[str, Any]:
    value: Any = {}
    for level in range(depth - 1):
        value = {"a": value} if level % 2 else [value]
    return {**HELLO, "metadata": value}


async def test_deep_json_is_refused_and_wide_json_is_not() -> None:
    served = serve()
    assert (await served(json_body=nested(MAX_JSON_DEPTH - 1))).status == 200
    reply = await served(json_body=nested(MAX_JSON_DEPTH))
    assert (reply.status, f"{MAX_JSON_DEPTH} deep" in reply.error["message"]) == (400, True)
    assert (await served(json_body=nested(sys.getrecursionlimit() - 200))).status == 400
    assert (await served(json_body={**HELLO, "metadata": [{"k": []}] * 1000})).status == 200
    assert (await served(json_body={**HELLO, "stop": "[{" * 1000})).status == 200


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_the_content_type_must_be_json(content_type: str | None) -> None:
    served = serve()
    headers = {"content-type": content_type} if content_type else {}
    reply = await served(chunks=[json.dumps(HELLO).encode()], headers=headers)
    assert (reply.status, reply.error["code"]) == (400, "unsupported_content_type")
    assert served.inner.requests == []


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        ("/v1/completions", "max_tokens"),
        ("/v1/responses", "max_output_tokens"),
        ("/v1/messages", "max_tokens"),
    ],
)
async def test_output_tokens_are_bounded(path: str, field: str) -> None:
    served = serve(max_output_tokens=100)
    assert (await served(path=path, json_body={**HELLO, field: 100})).status == 200
    reply = await served(path=path, json_body={**HELLO, field: 101})
    assert reply.status == 400
    assert reply.error["message"] == f"{field} must be at most 100 on this server, not 101."
    if path != "/v1/messages":
        assert reply.error["param"] == field
    assert len(served.inner.requests) == 1


@pytest.mark.parametrize("value", ["1000", 1e9, 12.0, True, [5]])
@pytest.mark.parametrize("field", ["max_tokens", "n"])
async def test_a_number_in_disguise_does_not_pass_the_limit(field: str, value: object) -> None:
    reply = await serve(max_output_tokens=100)(json_body={**HELLO, field: value})
    assert (reply.status, reply.error["param"]) == (400, field)


async def test_the_last_of_two_fields_counts() -> None:
    served = serve(max_output_tokens=100)
    body = b'{"model":"demo","messages":[],"max_tokens":5,"max_tokens":500}'
    reply = await served(chunks=[body], headers={"content-type": "application/json"})
    assert reply.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 4}, None),
        ({"n": 5}, "n"),
        ({"prompt": ["a"] * 10}, None),
        ({"prompt": ["a"] * 11}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 2}, None),
        ({"prompt": ["a"] * 5, "n": 3}, "prompt"),
        ({"prompt": [[1, 2]] * 11}, "prompt"),
        ({"prompt": list(range(1000))}, None),
        ({"prompt": ["a"] * 11, "n": 0}, "prompt"),
        ({"prompt": ["a"] * 11, "n": -1}, "prompt"),
    ],
)
async def test_sequences_are_bounded(fields: dict[str, Any], param: str | None) -> None:
    reply = await serve(max_n=4, max_sequences=10)(
        path="/v1/completions", json_body={"model": "demo", "prompt": "a", **fields}
    )
    assert reply.status == (400 if param else 200)
    if param:
        assert reply.error["param"] == param


@pytest.mark.parametrize(("prompt", "count"), [("a", 1), ([], 1), (["a", "b"], 2), ([1, 2], 1), ([[1], [2]], 2)])
def test_counting_prompts(prompt: object, count: int) -> None:
    assert count_prompts(prompt) == count


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_embeds", "AAAA"),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs.chat_template", {"chat_template": "{{ x }}"}),
        ("kv_transfer_params", {"do_remote_prefill": True}),
        ("ec_transfer_params", {}),
        ("vllm_xargs", {"kv_transfer_params": "x"}),
        ("mm_processor_kwargs", {"num_crops": 10**6}),
        ("media_io_kwargs", {"video": {"num_frames": 10**6}}),
    ],
)
async def test_dangerous_fields_are_refused(field: str, value: object) -> None:
    served = serve()
    reply = await served(json_body={**HELLO, field.partition(".")[0]: value})
    assert (reply.status, reply.error["param"]) == (400, field)
    assert served.inner.requests == []


async def test_dangerous_fields_may_be_null_or_allowed() -> None:
    assert (await serve()(json_body={**HELLO, "chat_template": None, "chat_template_kwargs": {"x": 1}})).status == 200
    assert (await serve(denied_fields=frozenset())(json_body={**HELLO, "chat_template": "x"})).status == 200


@pytest.mark.parametrize("stream", ["true", 1, "no"])
async def test_stream_is_a_boolean(stream: object) -> None:
    reply = await serve()(json_body={**HELLO, "stream": stream})
    assert (reply.status, reply.error["param"]) == (400, "stream")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"include_usage": None, "x": 1}, {"include_usage": True, "x": 1}),
        ({"continuous_usage_stats": True}, {"include_usage": True}),
    ],
)
@pytest.mark.parametrize("end", [b"", b" \n"])
def test_usage_is_asked_for(options: object, wanted: dict[str, Any], end: bytes) -> None:
    fields = {"model": "demo", "stream": True, "text": "a } b", "stream_options": options}
    for text in (json.dumps(fields), json.dumps(fields, indent=2)):
        changed = with_usage(text.encode() + end, fields, ROUTE[CHAT])
        assert changed is not None
        assert json.loads(changed) == {**fields, "stream_options": {**wanted, "continuous_usage_stats": False}}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"stream": True, "stream_options": {"include_usage": True}}),
        (CHAT, {"stream": True, "stream_options": "bad"}),
        (CHAT, {"stream": False}),
        (CHAT, {"stream": None}),
        (CHAT, {}),
        ("/v1/responses", {"stream": True}),
        ("/v1/messages", {"stream": True}),
    ],
)
def test_usage_is_not_asked_for_where_that_is_wrong_or_done(path: str, fields: dict[str, Any]) -> None:
    assert with_usage(json.dumps(fields).encode(), fields, ROUTE[path]) is None


async def test_the_app_sees_a_consistent_request() -> None:
    served = serve([b"data: [DONE]\n\n"])
    await served(
        json_body={**HELLO, "stream": True},
        headers={"transfer-encoding": "chunked", "content-type": "application/json; charset=utf-16"},
    )
    _, headers, body = served.inner.requests[0]
    assert headers["content-length"] == str(len(body))
    assert headers["content-type"] == "application/json"
    assert "transfer-encoding" not in headers
    assert served.inner.seen_json["stream_options"]["include_usage"] is True
