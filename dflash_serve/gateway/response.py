"""Watches a response on its way out: names the request, notes what it cost, makes errors presentable.

A stream passes chunk by chunk; the JSON of a generation and the body of an error are held until they are complete,
because their headers depend on them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dflash_serve.gateway.config import GatewayConfig
from dflash_serve.gateway.errors import ApiError, internal_error, normalise
from dflash_serve.gateway.record import RequestRecord
from dflash_serve.gateway.routes import OTHER, Dialect, Route
from dflash_serve.gateway.usage import fold_speculation, note_usage

logger = logging.getLogger("dflash_serve.gateway")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

ACCEPTANCE_LENGTH_HEADER = b"x-dflash-acceptance-length"
MAX_ERROR_BYTES = 64 * 1024
"""More of an error's body than this is not read."""

EVENT_END = b"\n\n"

# Inside a JSON string each quote is escaped: a mark with quotes can only stand for itself. One without may turn up in a
# text, so it decides only where an event begins with it.
USAGE_MARKS: dict[Dialect, bytes] = {
    "openai": b'"choices":[]',
    "responses": b"event: response.completed",
    "anthropic": b"event: message_delta",
}
"""In the one event of a stream that carries the final usage."""

ERROR_MARKS: dict[Dialect, bytes] = {
    "openai": b'data: {"error"',
    "responses": b"event: error",
    "anthropic": b"event: error",
}

CONTENT_MARKS: dict[Dialect, bytes] = {
    "openai": b"data:",  # the first event waits for the first token; comments keep a connection alive before
    "responses": b".delta",  # response.created and .in_progress come before any token
    "anthropic": b"event: message_start",  # waits for the first token
}
"""In the first event that shows that a token was generated."""

STREAM_ENDS: dict[Dialect, bytes] = {"openai": b"data: [DONE]\n\n", "responses": b"", "anthropic": b""}


class ResponseFilter:
    """One response. Call it as an ASGI `send`.

    Args:
        send: Where to send.
        record: Filled in as the response passes.
        start_seconds: When the request came, of `time.perf_counter()`.
    """

    def __init__(
        self, send: Send, record: RequestRecord, config: GatewayConfig, *, model_id: str, start_seconds: float
    ) -> None:
        self._client_send = send
        self._record = record
        self._config = config
        self._model_id = model_id
        self._start_seconds = start_seconds
        self._streaming = False
        self._tail = b""  # of a stream: the beginning of an event whose end has not come yet
        self._held: Message | None = None  # the start of a response whose body is held
        self._chunks: list[bytes] = []
        self._held_bytes = 0
        self.hide_usage = False
        """Drop a stream's usage event: the gateway asked for it, the client did not."""
        self.started = False
        """The client has been sent a status."""
        self.finished = False
        """The client has been sent all."""
        self.client_left = False
        """The server could not send: nobody is there."""
        self.expect(OTHER)

    def expect(self, route: Route) -> None:
        """Say which route's response this is, once that is known."""
        self.route = route
        self._usage_mark = USAGE_MARKS[route.dialect]
        self._error_mark = ERROR_MARKS[route.dialect]
        self._content_mark = CONTENT_MARKS[route.dialect]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            body, more = message.get("body", b""), message.get("more_body", False)
            if self._streaming:
                if (
                    more
                    and body.endswith(EVENT_END)
                    and not self._tail
                    and self._record.ttft_seconds is not None
                    and self._usage_mark not in body
                    and self._error_mark not in body
                ):  # nearly every chunk
                    try:
                        await self._client_send(message)
                    except OSError:
                        self.client_left = True
                        raise
                else:
                    await self._stream(body, more)
            elif self._held is not None:
                await self._hold(body, more)
            else:
                self.finished = not more
                await self._send(message)
        elif message["type"] == "http.response.start":
            await self._begin(message)
        else:
            await self._send(message)

    async def send_error(self, error: ApiError) -> None:
        """Answer with `error`; the response must not have started."""
        await self._send_whole(
            error.status,
            [(b"content-type", b"application/json"), *error.headers],
            error.body(self.route.dialect, self._record.request_id),
        )

    async def fail(self) -> bool:
        """Tell the client that the app broke; False when the response has gone too far for that."""
        error = internal_error(self._record.request_id)
        self._record.outcome = "error"
        if not self.started:
            await self.send_error(error)
        elif self._streaming and not self.finished:
            event = error.event(self.route.dialect, self._record.request_id) + STREAM_ENDS[self.route.dialect]
            self.finished = True
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        return self.finished

    async def _send(self, message: Message) -> None:
        try:
            await self._client_send(message)
        except OSError:
            self.client_left = True
            raise

    def _note_first_output(self) -> None:
        self._record.ttft_seconds = time.perf_counter() - self._start_seconds

    async def _begin(self, message: Message) -> None:
        status = message["status"]
        content_type = _header(message, b"content-type")
        if status >= 400:
            self._held = message
            return
        if self.route.generates:
            if content_type.startswith(b"text/event-stream"):
                self._streaming = True
            else:
                if self._record.outcome == "ok":
                    self._note_first_output()
                if content_type.startswith(b"application/json"):
                    self._held = message
                    return
        await self._send_start(status, message.get("headers", []), message)

    async def _send_start(self, status: int, headers: Any, message: Message | None = None) -> None:
        if self._config.set_request_id_header:
            request_id = (b"x-request-id", self._record.request_id.encode())
            headers = [request_id, *(pair for pair in headers if pair[0].lower() != b"x-request-id")]
        if self._record.outcome != "disconnected":  # else vLLM answers 200 to nobody
            self._record.status = status
        self.started = True
        await self._send({**(message or {"type": "http.response.start"}), "status": status, "headers": headers})

    async def _send_whole(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await self._send_start(status, [*headers, (b"content-length", str(len(body)).encode())])
        self.finished = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _hold(self, body: bytes, more: bool) -> None:
        assert self._held is not None
        is_error = self._held["status"] >= 400
        if not is_error or self._held_bytes < MAX_ERROR_BYTES:
            self._chunks.append(body)
            self._held_bytes += len(body)
        if more:
            return
        start, whole = self._held, b"".join(self._chunks)
        self._held = None
        headers = [
            (name, value)
            for name, value in start.get("headers", [])
            if name.lower() not in (b"content-length", b"content-type")
        ]
        if is_error:
            await self._send_app_error(start["status"], headers, whole[:MAX_ERROR_BYTES])
        else:
            headers.append((b"content-type", _header(start, b"content-type")))
            await self._send_generation(start["status"], headers, whole)

    async def _send_app_error(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        error = normalise(
            status,
            body,
            route=self.route,
            request_id=self._record.request_id,
            model_id=self._model_id,
            retry_after_seconds=self._config.retry_after_seconds,
        )
        if status >= 500:
            logger.error("request %s: the app answered %d: %s", self._record.request_id, status, _excerpt(body))
        ours = {name for name, _ in error.headers}
        await self._send_whole(
            error.status,
            [
                *(pair for pair in headers if pair[0].lower() not in ours),
                (b"content-type", b"application/json"),
                *error.headers,
            ],
            error.body(self.route.dialect, self._record.request_id),
        )

    async def _send_generation(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        payload = _load_object(body)
        if payload is not None:
            note_usage(self._record, payload)
            if fold_speculation(payload):
                body = _dump(payload)
            acceptance_length = self._record.acceptance_length
            if acceptance_length is not None:
                headers.append((ACCEPTANCE_LENGTH_HEADER, f"{acceptance_length:.2f}".encode()))
        await self._send_whole(status, headers, body)

    async def _stream(self, body: bytes, more: bool) -> None:
        """A chunk that may matter: its whole events, with those of interest read, changed or dropped."""
        data = self._tail + body
        cut = data.rfind(EVENT_END) + len(EVENT_END) if more else len(data)
        if cut < len(EVENT_END):  # no end of an event yet
            cut = 0
        data, self._tail = data[:cut], data[cut:]
        if self._usage_mark in data or self._error_mark in data:
            *events, rest = data.split(EVENT_END)
            data = b"".join(map(self._event, events)) + rest
        if self._record.ttft_seconds is None and self._content_mark in data and self._record.outcome == "ok":
            self._note_first_output()
        if data or not more:
            self.finished = not more
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _event(self, event: bytes) -> bytes:
        """One event, with its end; empty when the client is not to see it."""
        if event.startswith(self._error_mark):
            return self._error_event(event)
        if event.startswith(self._usage_mark) or (self.route.dialect == "openai" and self._usage_mark in event):
            head, mark, text = event.partition(b"data: ")
            payload = _load_object(text)
            if payload is not None:
                if self.route.dialect == "responses" and isinstance(payload.get("response"), dict):
                    note_usage(self._record, payload["response"])
                elif isinstance(payload.get("usage"), dict):
                    note_usage(self._record, payload)
                    if self.hide_usage:
                        return b""
                    if fold_speculation(payload):
                        event = head + mark + _dump(payload)
        return event + EVENT_END

    def _error_event(self, event: bytes) -> bytes:
        """vLLM's way to report a failure after the response began (`create_streaming_error_response`)."""
        self._record.outcome = "error"
        body = event.partition(b"data: ")[2]
        payload = _load_object(body) or {}
        error = payload.get("error")
        status = error.get("code") if isinstance(error, dict) else None
        status = status if isinstance(status, int) and 400 <= status < 600 else 500
        if status >= 500:
            logger.error("request %s: the stream failed: %s", self._record.request_id, _excerpt(body))
        presentable = normalise(
            status,
            body,
            route=self.route,
            request_id=self._record.request_id,
            model_id=self._model_id,
            retry_after_seconds=self._config.retry_after_seconds,
        )
        return presentable.event(self.route.dialect, self._record.request_id)


def _header(message: Message, name: bytes) -> bytes:
    return next((value for key, value in message.get("headers", []) if key.lower() == name), b"")


def _load_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _dump(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def _excerpt(body: bytes) -> str:
    return body[:500].decode("utf-8", "replace")
