import asyncio
from typing import Any

import pytest
from gateway_client import CHAT, HELLO, REMOTE, serve

from dflash_serve.gateway import GatewayConfig


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
)
async def test_what_clients_post_to_is_open(path: str) -> None:
    served = serve()
    reply = await served(path=path, json_body=HELLO)
    assert (reply.status, served.record.route, served.record.outcome) == (200, path, "ok")


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/demo", "/v1/models/{id}"),
        ("/v1/models/google/gemma-4-31B-it", "/v1/models/{id}"),
        ("/health", "/health"),
    ],
)
async def test_what_clients_get_is_open(path: str, route: str) -> None:
    served = serve()
    assert (await served("GET", path)).status == 200
    assert served.inner.requests[0][0] == path
    assert served.record.route == route


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("POST", "/scale_elastic_ep"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/chat/completions/batch"),
        ("POST", "/v1/chat/completions/render"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/"),
        ("GET", ""),
        # other spellings of open paths
        ("GET", "/health/"),
        ("GET", "//health"),
        ("GET", "/v1//models"),
        ("GET", "/v1/models/"),
        ("GET", "/V1/models"),
        ("GET", "/v1/models%2Fdemo"),
        ("POST", CHAT + "/"),
        ("POST", "/v1/../v1/chat/completions"),
        ("POST", "/v1/chat/completions\n"),
        ("POST", "/v1/chat/completions;x=1"),
    ],
)
async def test_all_else_is_closed(method: str, path: str) -> None:
    served = serve()
    reply = await served(method, path, json_body=HELLO if method == "POST" else None)
    assert reply.status == 404
    assert (reply.error["type"], reply.error["code"]) == ("invalid_request_error", "unknown_url")
    assert served.inner.requests == []
    assert (served.record.route, served.record.outcome) == ("other", "rejected")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("HEAD", "/health", "GET"), ("OPTIONS", CHAT, "POST")],
)
async def test_a_wrong_method_is_told_the_right_one(method: str, path: str, allow: str) -> None:
    served = serve()
    reply = await served(method, path)
    assert (reply.status, reply.headers["allow"]) == (405, allow)
    assert served.inner.requests == []


async def test_a_made_up_method_does_not_reach_metrics() -> None:
    served = serve()
    assert (await served("BREW", CHAT)).status == 405
    assert served.record.method == "OTHER"


async def test_below_a_mount_point() -> None:
    served = serve()
    assert (await served("GET", "/llm/v1/models", root_path="/llm")).status == 200
    assert (await served("GET", "/v1/models", root_path="/llm")).status == 200  # as Starlette's router has it
    assert (await served("GET", "/v1/models", root_path="/v")).status == 200
    assert (await served("GET", "/llmx/v1/models", root_path="/llm")).status == 404
    assert (await served("GET", "/llm/metrics", root_path="/llm")).status == 404
    assert (await served("GET", "/llm", root_path="/llm")).status == 404


async def test_routes_can_be_opened() -> None:
    served = serve(extra_routes=("POST /tokenize",), keys=["k"])
    with_key = {"authorization": "Bearer k"}
    reply = await served(path="/tokenize", chunks=[b"not json"], headers=with_key | {"content-type": "text/plain"})
    assert reply.status == 200
    assert served.inner.requests[0][2] == b"not json"
    assert served.inner.requests[0][1]["content-type"] == "text/plain"
    assert (await served(path="/tokenize", json_body={})).status == 401
    assert (await served("GET", "/tokenize")).status == 405


@pytest.mark.parametrize("route", ["/tokenize", "POST", "POST tokenize", "post /tokenize", "GET /v1/files/{id}"])
def test_a_route_that_cannot_be_opened_is_refused_at_start(route: str) -> None:
    with pytest.raises(ValueError, match="extra_routes"):
        GatewayConfig(extra_routes=(route,))


@pytest.mark.parametrize("field", ["max_body_bytes", "max_n", "max_output_tokens", "retry_after_seconds"])
def test_a_limit_below_one_is_refused_at_start(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        GatewayConfig(**{field: 0})  # type: ignore[arg-type]


async def test_a_browser_may_ask_first() -> None:
    served = serve(keys=["k"])
    asks = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    assert (await served("OPTIONS", CHAT, headers=asks)).status == 200
    assert (await served("OPTIONS", "/metrics", headers=asks)).status == 404
    assert len(served.inner.requests) == 1


async def test_websockets_are_closed_before_they_open() -> None:
    served = serve()
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await served.gateway({"type": "websocket", "path": "/v1/realtime", "headers": [], "client": REMOTE}, receive, send)
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


async def test_lifespan_reaches_the_app() -> None:
    served = serve()
    incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> dict[str, str]:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await asyncio.wait_for(served.gateway({"type": "lifespan", "state": {}}, receive, send), 5)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
