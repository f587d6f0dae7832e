"""A client that speaks ASGI: says exactly what a server would, and keeps what it is told message by message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dflash_serve.gateway import ApiKeys, Gateway, GatewayConfig, RequestRecord

LOCAL = ("127.0.0.1", 50000)
REMOTE = ("203.0.113.7", 50000)
CHAT = "/v1/chat/completions"
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}

SPECULATION = {
    "mean_acceptance_length": 3.5,
    "draft_acceptance_rate": 0.5,
    "acceptance_histogram": [0, 0, 1, 1, 0],
    "num_spec_steps": 2,
    "num_accepted_draft_tokens": 5,
    "num_draft_tokens": 8,
    "num_spec_tokens": 4,
}
"""As vLLM 0.29 reports it for one request."""


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    header_names: list[str] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json()["error"]

    def events(self) -> list[Any]:
        """The data of each server-sent event: parsed, or as text when it is not JSON."""
        datas = [event.partition(b"data: ")[2] for event in self.body.split(b"\n\n") if b"data: " in event]
        return [data.decode() if data == b"[DONE]" else json.loads(data) for data in datas]


async def call(
    app: Any,
    method: str = "POST",
    path: str = CHAT,
    json_body: object = None,
    *,
    chunks: Iterable[bytes] = (),
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    client: tuple[str, int] | None = LOCAL,
    root_path: str = "",
    leave_after: int | None = None,
) -> Reply:
    """One request.

    Args:
        json_body: Sent as JSON with its content type and length; else `chunks` are sent as they are, without.
        leave_after: Disconnect once that many body messages have come; 0 disconnects while the request is sent.
    """
    given = headers.items() if isinstance(headers, Mapping) else headers
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in given]
    if json_body is not None:
        text = json.dumps(json_body).encode()
        chunks = [text]
        names = {name for name, _ in pairs}
        pairs += [
            pair
            for pair in [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
            if pair[0] not in names
        ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": root_path,
        "headers": pairs,
        "client": client,
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    incoming = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if leave_after == 0:
        incoming.append({"type": "http.disconnect"})
    else:
        incoming.append({"type": "http.request", "body": b"", "more_body": False})
    reply, gone = Reply(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if incoming:
            return incoming.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.header_names = [name.decode() for name, _ in message["headers"]]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            assert not reply.complete, "a body after the end"
            reply.chunks.append(message.get("body", b""))
            reply.complete = not message.get("more_body", False)
            if reply.complete or leave_after == len(reply.chunks):
                gone.set()
                await asyncio.sleep(0)

    await app(scope, receive, send)
    return reply


class Inner:
    """The app behind the gateway: Starlette, answering every path with what a test gives it, noting what it saw.

    Args:
        answer: A JSON object, a Response, an exception to raise, or the chunks of an event stream (an exception
            among them is raised there).
    """

    def __init__(self, answer: Any = None, status: int = 200) -> None:
        self.answer = {"id": "x"} if answer is None else answer
        self.status = status
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
        self.app = Starlette(routes=[Route("/{path:path}", self._handle, methods=methods)])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

    @property
    def seen_json(self) -> Any:
        return json.loads(self.requests[-1][2])

    async def _handle(self, request: Request) -> Response:
        self.requests.append((request.url.path, dict(request.headers), await request.body()))
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, Response):
            return self.answer
        if isinstance(self.answer, list):
            return StreamingResponse(self._stream(self.answer), media_type="text/event-stream")
        return JSONResponse(self.answer, status_code=self.status)

    @staticmethod
    async def _stream(chunks: list[Any]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
            await asyncio.sleep(0)


@dataclass
class Served:
    """A gateway with the app behind it and the records it made."""

    gateway: Gateway
    inner: Any
    records: list[RequestRecord]

    async def __call__(self, *args: Any, **kwargs: Any) -> Reply:
        return await call(self.gateway, *args, **kwargs)

    @property
    def record(self) -> RequestRecord:
        assert len(self.records) == 1
        return self.records[0]


def serve(inner: Any = None, *, keys: Iterable[str] = (), **options: Any) -> Served:
    """A gateway around `inner` (an app, or an answer for `Inner`); `options` are GatewayConfig's."""
    app = inner if callable(inner) and not isinstance(inner, Response) else Inner(inner)
    if keys:
        options["api_keys"] = ApiKeys(keys)
    records: list[RequestRecord] = []
    return Served(Gateway(app, GatewayConfig(**options), model_id="demo", observe=records.append), app, records)


def sse(payload: object, event: str | None = None) -> bytes:
    """A server-sent event with compact JSON, as pydantic writes it."""
    data = payload if isinstance(payload, str) else json.dumps(payload, separators=(",", ":"), ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


def chat_chunk(text: str) -> bytes:
    return sse(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "demo",
            "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}],
        }
    )


def usage_chunk(speculation: object = SPECULATION) -> bytes:
    chunk: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "demo",
        "choices": [],
        "usage": {"prompt_tokens": 9, "total_tokens": 16, "completion_tokens": 7},
    }
    if speculation is not None:
        chunk["metrics"] = {"speculative_decoding": speculation}
    return sse(chunk)


DONE = b"data: [DONE]\n\n"
