"""The gateway itself: takes a request through its checks to the app, and the response back."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from dflash_serve.gateway.auth import Authorizer
from dflash_serve.gateway.config import GatewayConfig
from dflash_serve.gateway.errors import ApiError, engine_stopped, overloaded
from dflash_serve.gateway.peers import local_addresses
from dflash_serve.gateway.record import RequestRecord
from dflash_serve.gateway.request_body import (
    ClientDisconnected,
    Receive,
    check_limits,
    parse_object,
    read_body,
    with_usage,
)
from dflash_serve.gateway.response import Message, ResponseFilter, Send
from dflash_serve.gateway.routes import METHODS, OTHER, Route, RouteTable, route_path
from dflash_serve.gateway.traffic import trace_id

logger = logging.getLogger("dflash_serve.gateway")

Scope = MutableMapping[str, Any]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
RAYS_HEADER = b"serve_multiplexed_model_id"
"""With which Ray Serve asks for an adapter of a model; it raises where there is none."""
POLICY_VIOLATION = 1008
"""WebSocket close code (RFC 6455, section 7.4.1)."""


class Gateway:
    """ASGI middleware around vLLM's OpenAI app.

    Args:
        app: The app that `vllm serve` builds, or anything with the same routes.
        config: What is allowed.
        model_id: The served model's name, for messages and logs.
        observe: Called once a request, when it has ended; what it raises is logged.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: GatewayConfig,
        *,
        model_id: str,
        observe: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.app = app
        self._config = config
        self._model_id = model_id
        self._observe = observe
        self._routes = RouteTable(config.extra_routes)
        self._authorizer = Authorizer(config.api_keys, config.anonymous, local_addresses())
        self._in_flight = 0
        self._closed = False

    def close(self) -> None:
        """Take no more generation requests: 503, to be sent again. Those in flight go on."""
        self._closed = True

    @property
    def in_flight(self) -> int:
        """Generation requests that the app is working on."""
        return self._in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        elif scope["type"] == "websocket":  # vLLM's realtime API: no route here is one
            await receive()
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": "WebSockets are not served."})
        else:
            await self.app(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        start_seconds = time.perf_counter()
        headers = dict(reversed(scope["headers"]))  # the first of each name
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        record = RequestRecord(choose_request_id(headers.get(b"x-request-id")), method, OTHER.template)
        record.traffic_class = self._config.traffic.of(headers)
        record.trace_id = trace_id(headers)
        response = ResponseFilter(send, record, self._config, model_id=self._model_id, start_seconds=start_seconds)
        try:
            try:
                await self._serve(scope, receive, headers, record, response)
            except ApiError as error:
                await response.send_error(error)
        except ClientDisconnected:
            record.outcome = "disconnected"
        except asyncio.CancelledError:  # a server may cancel a request whose client left
            if not response.finished:
                record.outcome = "disconnected"
            raise
        except Exception:
            if response.client_left or record.outcome == "disconnected":
                record.outcome = "disconnected"
                logger.debug("request %s failed after its client had left", record.request_id, exc_info=True)
            else:
                logger.exception("request %s failed", record.request_id)
                if not await response.fail():
                    raise
        finally:
            record.duration_seconds = time.perf_counter() - start_seconds
            self._finish(record, response.route)

    async def _serve(
        self,
        scope: Scope,
        receive: Receive,
        headers: Mapping[bytes, bytes],
        record: RequestRecord,
        response: ResponseFilter,
    ) -> None:
        if any(name.lower().replace(b"-", b"_") == RAYS_HEADER for name in headers):
            raise ApiError(400, f"The header {RAYS_HEADER.decode()} is not for clients.", code="header_not_allowed")
        preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        route = self._find_route(scope, preflight)
        record.route = route.template
        response.expect(route)
        if not route.public:
            self._authorizer.check(scope, headers, preflight=preflight)
        if route.generates:
            self._check_room(record)

        body = None
        if scope["method"] in ("POST", "PUT", "PATCH"):
            body = await read_body(receive, headers, self._config.max_body_bytes)
        if body is not None and route.json_body:
            fields = parse_object(body, headers.get(b"content-type", b""))
            check_limits(fields, self._config)
            record.stream = bool(fields.get("stream"))
            changed = with_usage(body, fields, route)
            if changed is not None:
                body = changed
                response.hide_usage = True

        app_scope = {**scope, "headers": _app_headers(scope["headers"], record.request_id, body, route)}
        app_receive = _replay(receive, body, record, response)
        if route.generates:
            self._check_room(record)  # others came while the body did
            self._in_flight += 1
        try:
            await self.app(app_scope, app_receive, response)
        finally:
            if route.generates:
                self._in_flight -= 1
        if not response.finished and record.outcome != "disconnected":
            raise RuntimeError("the app returned without a complete response")

    def _find_route(self, scope: Scope, preflight: bool) -> Route:
        path = route_path(scope)
        methods = self._routes.methods(path)
        if not methods:
            raise ApiError(404, f"There is no {scope['method']} {path[:200]} on this server.", code="unknown_url")
        if preflight:
            return Route("OPTIONS", next(iter(methods.values())).template)
        if scope["method"] not in methods:
            allowed = ", ".join(sorted(methods))
            raise ApiError(
                405,
                f"{path[:200]} takes {allowed}, not {scope['method']}.",
                code="method_not_allowed",
                headers=((b"allow", allowed.encode()),),
            )
        return methods[scope["method"]]

    def _check_room(self, record: RequestRecord) -> None:
        if self._closed:
            raise engine_stopped(self._config.retry_after_seconds)
        limit = self._config.max_concurrent_requests
        if limit is not None and self._in_flight >= limit:
            record.outcome = "shed"
            raise overloaded(self._config.retry_after_seconds)

    def _finish(self, record: RequestRecord, route: Route) -> None:
        if record.outcome == "ok" and record.status >= 400:
            record.outcome = "error" if record.status >= 500 else "rejected"
        probe = route.public and record.outcome == "ok"
        record.log(self._model_id, logging.DEBUG if probe else logging.INFO)
        if self._observe is not None:
            try:
                self._observe(record)
            except Exception:
                logger.exception("request %s: observe failed", record.request_id)


def choose_request_id(given: bytes | None) -> str:
    """The client's id when it is fit for logs and headers, else a new one."""
    if given is not None and SANE_REQUEST_ID.fullmatch(given):
        return given.decode()
    return f"req_{os.urandom(16).hex()}"


def _app_headers(
    headers: list[tuple[bytes, bytes]], request_id: str, body: bytes | None, route: Route
) -> list[tuple[bytes, bytes]]:
    """The request's headers as the app is to see them. vLLM makes its own ids out of x-request-id."""
    ours = [(b"x-request-id", request_id.encode())]
    if body is not None:
        ours.append((b"content-length", str(len(body)).encode()))
    if route.json_body:  # read as such already: the app must not read it as anything else
        ours.append((b"content-type", b"application/json"))
    names = {name for name, _ in ours} | ({b"transfer-encoding"} if body is not None else set())
    return [pair for pair in headers if pair[0] not in names] + ours


def _replay(receive: Receive, body: bytes | None, record: RequestRecord, response: ResponseFilter) -> Receive:
    """A `receive` that gives the body that was read, then what the client does next: vLLM stops when it leaves."""
    pending = body

    async def replay() -> Message:
        nonlocal pending
        if pending is not None:
            message: Message = {"type": "http.request", "body": pending, "more_body": False}
            pending = None
            return message
        message = await receive()
        if message["type"] == "http.disconnect" and not response.finished:
            record.outcome = "disconnected"
        return message

    return replay
