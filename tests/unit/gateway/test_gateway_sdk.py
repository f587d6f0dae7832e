"""The clients' own libraries against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import uvicorn
from gateway_client import DONE, Inner, Served, chat_chunk, serve, usage_chunk
from starlette.responses import JSONResponse

MESSAGES: Any = [{"role": "user", "content": "hello"}]


class Answers(Inner):
    """Answers each request with what its x-request-id asks for."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode()
            self.answer = ANSWERS[request_id]
        await self.app(scope, receive, send)


ANSWERS: dict[str, Any] = {
    "stream": [chat_chunk("a"), chat_chunk("b"), usage_chunk(), DONE],
    "broken-stream": [chat_chunk("a"), RuntimeError("secret")],
    "dead": JSONResponse(
        {"error": {"message": "EngineCore encountered an issue.", "type": "", "code": 500}}, status_code=500
    ),
    "no-model": JSONResponse(
        {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}},
        status_code=404,
    ),
}


@pytest.fixture
async def served() -> AsyncIterator[tuple[Served, str]]:
    gateway = serve(Answers(), keys=["sk-good"], max_body_bytes=10_000)
    config = uvicorn.Config(gateway.gateway, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has nothing else to wait for
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield gateway, f"http://127.0.0.1:{port}"
    server.should_exit = True
    await task


def client(url: str, key: str = "sk-good", retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries)


async def test_streams(served: tuple[Served, str]) -> None:
    gateway, url = served
    async with client(url) as sdk:
        headers = {"x-request-id": "stream"}
        stream = await sdk.chat.completions.create(model="demo", messages=MESSAGES, stream=True, extra_headers=headers)
        chunks = [chunk async for chunk in stream]
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["a", "b"]

        stream = await sdk.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers=headers,
        )
        usage = [chunk async for chunk in stream][-1].usage
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.accepted_prediction_tokens == 5
        assert usage.completion_tokens_details.rejected_prediction_tokens == 3

        with pytest.raises(openai.APIError, match="failed to process the request"):
            async for _ in await sdk.chat.completions.create(
                model="demo", messages=MESSAGES, stream=True, extra_headers={"x-request-id": "broken-stream"}
            ):
                pass
    assert [record.outcome for record in gateway.records] == ["ok", "ok", "error"]


async def test_errors_are_the_sdks_own(served: tuple[Served, str]) -> None:
    gateway, url = served
    async with client(url, key="sk-bad") as sdk:
        with pytest.raises(openai.AuthenticationError) as unauthorised:
            await sdk.models.list()
        assert unauthorised.value.code == "invalid_api_key"
        assert unauthorised.value.request_id == gateway.records[0].request_id
    async with client(url) as sdk:
        with pytest.raises(openai.NotFoundError) as missing:
            await sdk.chat.completions.create(model="x", messages=MESSAGES, extra_headers={"x-request-id": "no-model"})
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as bad:
            await sdk.chat.completions.create(model="demo", messages=MESSAGES, n=9)
        assert bad.value.param == "n"
        with pytest.raises(openai.APIStatusError) as large:
            await sdk.chat.completions.create(model="demo", messages=MESSAGES, user="x" * 20_000)
        assert large.value.status_code == 413


async def test_the_sdk_retries_when_the_engine_is_dead(
    served: tuple[Served, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, url = served
    waited: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float, *args: Any) -> None:
        waited.append(seconds)
        await sleep(0 if seconds >= 0.5 else seconds)

    async with client(url, retries=1) as sdk:
        monkeypatch.setattr("anyio.sleep", note)
        with pytest.raises(openai.InternalServerError):
            await sdk.chat.completions.create(model="demo", messages=MESSAGES, extra_headers={"x-request-id": "dead"})
    assert [record.status for record in gateway.records] == [503, 503]
    assert 1 in waited  # Retry-After


async def test_anthropics_sdk(served: tuple[Served, str]) -> None:
    anthropic = pytest.importorskip("anthropic")
    _, url = served
    message = {"model": "demo", "max_tokens": 5, "messages": MESSAGES}
    async with anthropic.AsyncAnthropic(base_url=url, api_key="sk-bad", max_retries=0) as sdk:
        with pytest.raises(anthropic.AuthenticationError):
            await sdk.messages.create(**message)
    async with anthropic.AsyncAnthropic(base_url=url, api_key="sk-good", max_retries=0) as sdk:
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await sdk.messages.create(**message, extra_headers={"x-request-id": "no-model"})


async def test_routes_are_compared_after_the_servers_decoding(served: tuple[Served, str]) -> None:
    """A raw request line: what a library would tidy up first."""
    _, url = served
    port = int(url.rpartition(":")[2])
    for target in ("/%2e%2e/metrics", "/v1/..%2fmetrics", "//metrics", "/metrics%00", "/v1/models/../../metrics"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status = (await reader.read()).split(b" ")[1]
        writer.close()
        # /v1/models/<anything> is a model's id, as it is to the app: it needs a key, and there is no such model
        assert status in ((b"401",) if target.startswith("/v1/models/") else (b"404", b"400")), target
