import json
from typing import Any

import pytest
from gateway_client import CHAT, DONE, HELLO, chat_chunk, serve, sse
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

# What vLLM 0.29 answers, recorded from its app.
TOO_LONG = (
    "This model's maximum context length is 256 tokens. However, you requested 0 output tokens and your prompt "
    "contains at least 257 input tokens, for a total of at least 257 tokens. Please reduce the length of the input "
    "prompt or the number of requested output tokens. (parameter=input_tokens, value=257)"
)
MISSING = (
    "1 validation error:\n  {'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required', 'input': {}}"
)
QUOTED = (
    "2 validation errors:\n  {'type': 'literal_error', 'loc': ('body', 'tool_choice'), 'msg': \"Input should be 'none'"
    "\", 'input': 'x'}\n  {'type': 'model_type', 'loc': ('body',), 'msg': 'Input should be valid', 'input': 'x'}"
)
BY_VALIDATOR = (
    "1 validation error:\n  {'type': 'value_error', 'loc': ('body',), 'msg': 'Value error, Only one.', 'input': {}}"
)
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def vllm_error(message: str, type: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


@pytest.mark.parametrize(
    ("path", "status", "error", "message", "param", "code"),
    [
        (CHAT, 400, vllm_error(TOO_LONG, "BadRequestError", 400, "input_tokens"), "maximum context length is 256",
         "messages", "context_length_exceeded"),
        ("/v1/completions", 400, vllm_error(TOO_LONG, "BadRequestError", 400, "input_tokens"), "maximum context",
         "prompt", "context_length_exceeded"),
        ("/v1/responses", 400, vllm_error("The engine prompt length 9 exceeds the max_model_len 8. Please reduce "
         "prompt.", "invalid_request_error", 400, "input"), "max_model_len 8", "input", "context_length_exceeded"),
        (CHAT, 404, vllm_error("The model `x` does not exist.", "NotFoundError", 404, "model"),
         "The model `x` does not exist. This server serves `demo`.", "model", "model_not_found"),
        (CHAT, 400, vllm_error(MISSING, "Bad Request", 400, "body.messages"), "messages: Field required", "messages",
         None),
        (CHAT, 400, vllm_error(QUOTED, "Bad Request", 400, "body.tool_choice"),
         "tool_choice: Input should be 'none'", "tool_choice", None),
        (CHAT, 400, vllm_error(BY_VALIDATOR, "Bad Request", 400, "body"), "Only one.", None, None),
        (CHAT, 400, vllm_error("temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)",
         "BadRequestError", 400, "temperature"), "temperature must be non-negative, got -1.0.", "temperature", None),
        (CHAT, 422, vllm_error("Cannot fetch the image.", "UnprocessableEntityError", 422), "Cannot fetch the image.",
         None, None),
        ("/v1/responses", 404, vllm_error("Response with id 'resp_1' not found.", "invalid_request_error", 404,
         "response_id"), "Response with id 'resp_1' not found.", "response_id", None),
    ],
)  # fmt: skip
async def test_a_client_error_becomes_openais(
    path: str, status: int, error: object, message: str, param: str | None, code: str | None
) -> None:
    served = serve(JSONResponse(error, status))
    reply = await served(path=path, json_body=HELLO)
    assert reply.status == status
    assert message in reply.error["message"]
    assert "(parameter=" not in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert served.record.outcome == "rejected"


async def test_an_unsupported_feature_is_the_clients_error() -> None:
    """OpenAI's SDK repeats a request after any 5xx."""
    error = vllm_error("The model does not support Chat Completions API", "NotImplementedError", 501)
    reply = await serve(JSONResponse(error, 501))(json_body=HELLO)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert "does not support Chat" in reply.error["message"]


async def test_a_huge_message_is_cut() -> None:
    error = vllm_error("bad " + "x" * 10_000, "BadRequestError", 400)
    reply = await serve(JSONResponse(error, 400))(json_body=HELLO)
    assert len(reply.body) < 1200
    error = vllm_error("bad " + "x" * 1_000_000, "BadRequestError", 400)
    reply = await serve(JSONResponse(error, 400))(json_body=HELLO)
    assert (reply.status, len(reply.body) < 1200) == (400, True)


@pytest.mark.parametrize(
    "answer",
    [
        JSONResponse(vllm_error("secret at 0xdead", "InternalServerError", 500), 500),
        JSONResponse({"detail": "secret"}, 500),
        PlainTextResponse('Traceback (most recent call last):\n  File "secret.py", line 1', 500),
        HTMLResponse("<html>secret</html>", 502),
        Response(b"\xff\xfe", 500),
        Response(b"", 504),
        RuntimeError("secret"),
    ],
)
async def test_a_server_error_tells_the_client_only_where_to_look(
    answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(answer)
    reply = await served(json_body=HELLO)
    assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", None)
    assert served.record.request_id in reply.error["message"]
    assert "secret" not in reply.body.decode()
    assert reply.headers["content-type"] == "application/json"
    assert served.record.outcome == "error"
    assert served.record.request_id in caplog.text


async def test_details_of_a_server_error_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    await serve(RuntimeError("the secret"))(json_body=HELLO)
    assert "the secret" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        JSONResponse(vllm_error(ENGINE_DEAD, "InternalServerError", 500), 500),
        JSONResponse(vllm_error("The engine is currently busy", "Service Unavailable", 503), 503),
        Response(b"", 503),
    ],
)
async def test_an_engine_that_cannot_answer_is_a_reason_to_retry(answer: object) -> None:
    reply = await serve(answer, retry_after_seconds=7)(json_body=HELLO)
    assert (reply.status, reply.error["type"], reply.error["code"]) == (503, "server_error", "service_unavailable")
    assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("7", "true")
    assert "EngineCore" not in reply.body.decode()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (PlainTextResponse("Disallowed CORS origin", 400), "Disallowed CORS origin"),
        (HTMLResponse("<h1>no</h1>", 403), "Forbidden."),
        (Response(b"", 418), "I'm a Teapot."),
        (Response(b"", 499), "The request failed."),
        (JSONResponse({"error": "Unauthorized"}, 401), "Unauthorized"),
        (JSONResponse({"detail": [{"msg": "x"}]}, 400), "Bad Request."),
        (JSONResponse([1], 400), "Bad Request."),
        (PlainTextResponse("[" * 60_000, 400), "["),
    ],
)
async def test_any_other_shape_becomes_openais(answer: object, message: str) -> None:
    reply = await serve(answer)(json_body=HELLO)
    assert reply.error["message"].lower().startswith(message.lower())
    assert reply.error["type"] == "invalid_request_error"


async def test_an_unknown_model_by_its_url() -> None:
    for answer in (
        JSONResponse({"detail": "Not Found"}, 404),
        JSONResponse(vllm_error("Unknown model: x", "", 404), 404),
    ):
        reply = await serve(answer)("GET", "/v1/models/x")
        assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
        assert "`demo`" in reply.error["message"]


async def test_the_apps_other_headers_are_kept() -> None:
    headers = {"access-control-allow-origin": "*", "retry-after": "99", "etag": "x"}
    reply = await serve(JSONResponse({}, 503, headers=headers))(json_body=HELLO)
    assert reply.headers["access-control-allow-origin"] == "*"
    assert reply.headers["retry-after"] == "1"
    assert reply.header_names.count("retry-after") == 1
    assert reply.headers["content-length"] == str(len(reply.body))


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
async def test_anthropic_clients_get_anthropics_shape(status: int, type: str) -> None:
    error = {"type": "error", "error": {"type": "SomeError", "message": "what went wrong"}}
    served = serve(JSONResponse(error, status))
    reply = await served(path="/v1/messages", json_body=HELLO)
    assert (reply.status, reply.json()["type"], reply.error["type"]) == (status, "error", type)
    assert ("what went wrong" in reply.error["message"]) == (status in (400, 404, 422))
    assert reply.json()["request_id"] == served.record.request_id


async def test_a_stream_that_breaks_says_so_and_ends() -> None:
    served = serve([chat_chunk("a"), RuntimeError("secret")])
    reply = await served(json_body={**HELLO, "stream": True})
    first, error, end = reply.events()
    assert first["choices"][0]["delta"]["content"] == "a"
    assert error["error"]["type"] == "server_error"
    assert served.record.request_id in error["error"]["message"]
    assert (end, reply.complete) == ("[DONE]", True)
    assert b"secret" not in reply.body
    assert (served.record.status, served.record.outcome) == (200, "error")


@pytest.mark.parametrize(("path", "type"), [("/v1/responses", "error"), ("/v1/messages", "error")])
async def test_a_stream_of_named_events_that_breaks_ends_with_one(path: str, type: str) -> None:
    served = serve([sse({"type": "x"}, "x"), RuntimeError("secret")])
    reply = await served(path=path, json_body={**HELLO, "stream": True})
    assert reply.body.split(b"\n\n")[1].startswith(b"event: error\ndata: ")
    error = reply.events()[1]
    assert error["type"] == type
    assert served.record.request_id in error["error"]["message"]
    assert reply.complete


@pytest.mark.parametrize(
    ("vllm", "type", "message"),
    [
        (vllm_error(ENGINE_DEAD, "InternalServerError", 500), "server_error", "The model engine has stopped"),
        (vllm_error("secret", "InternalServerError", 500), "server_error", "failed to process"),
        (vllm_error("stop is too long.", "BadRequestError", 400), "invalid_request_error", "stop is too long."),
    ],
)
async def test_an_error_that_vllm_streams_is_made_presentable(vllm: object, type: str, message: str) -> None:
    served = serve([chat_chunk("a"), b"data: " + json.dumps(vllm).encode() + b"\n\n", DONE])
    reply = await served(json_body={**HELLO, "stream": True})
    _, error, end = reply.events()
    assert (error["error"]["type"], end) == (type, "[DONE]")
    assert message in error["error"]["message"]
    assert b"secret" not in reply.body
    assert served.record.outcome == "error"


async def test_an_error_that_vllm_streams_first_is_no_first_token() -> None:
    served = serve([sse(vllm_error("secret", "InternalServerError", 500)), DONE])
    reply = await served(json_body={**HELLO, "stream": True})
    assert reply.events()[0]["error"]["type"] == "server_error"
    assert served.record.ttft_seconds is None


async def test_an_error_in_anthropics_stream() -> None:
    error = {"type": "error", "error": {"type": "internal_error", "message": "secret"}}
    served = serve([sse({"type": "message_start"}, "message_start"), sse(error, "error")])
    reply = await served(path="/v1/messages", json_body={**HELLO, "stream": True})
    assert reply.events()[1]["error"]["type"] == "api_error"
    assert b"secret" not in reply.body
    assert served.record.outcome == "error"


async def test_an_app_that_says_nothing_is_an_error() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    served = serve(silent)
    assert (await served(json_body=HELLO)).status == 500
    assert served.record.outcome == "error"


async def test_a_plain_response_that_breaks_is_cut_off() -> None:
    """Nothing true can be said any more: the server must drop the connection."""

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("secret")

    served = serve(broken)
    with pytest.raises(RuntimeError):
        await served("GET", "/v1/models")
    assert served.record.outcome == "error"
