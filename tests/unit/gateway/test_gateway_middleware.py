import asyncio
import json
import logging
import re
from typing import Any

import pytest
from gateway_client import CHAT, DONE, HELLO, Inner, Reply, call, chat_chunk, serve, usage_chunk
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from dflash_serve.gateway import Gateway, GatewayConfig, RequestRecord
from dflash_serve.gateway.middleware import choose_request_id

STREAM = {**HELLO, "stream": True}


@pytest.mark.parametrize("given", [b"a", b"req-1.2_3", b"x" * 128])
def test_a_sane_request_id_is_kept(given: bytes) -> None:
    assert choose_request_id(given) == given.decode()


@pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"a b", b"a\n", b"a/b", b"\xff", b"a;b"])
def test_another_gets_a_new_one(given: bytes | None) -> None:
    made = choose_request_id(given)
    assert re.fullmatch("req_[0-9a-f]{32}", made)
    assert made != choose_request_id(given)


@pytest.mark.parametrize("answer", [{"id": "x"}, Response(b"", 503), RuntimeError("x"), [chat_chunk("a"), DONE]])
async def test_the_request_id_is_everywhere(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    served = serve(answer)
    reply = await served(json_body=HELLO, headers={"x-request-id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    assert served.record.request_id == "mine"
    assert served.inner.requests[0][1]["x-request-id"] == "mine"
    ours = [line for line in caplog.records if line.name.startswith("dflash_serve")]
    assert ours
    assert all("mine" in line.getMessage() for line in ours)


async def test_a_refusal_has_a_request_id_too() -> None:
    for method, path in (("GET", "/nowhere"), ("PUT", CHAT), ("POST", CHAT)):
        reply = await serve(keys=["k"])(method, path, headers={"x-request-id": "a b"})
        assert reply.headers["x-request-id"].startswith("req_")


async def test_the_apps_own_request_id_header_is_replaced() -> None:
    answer = JSONResponse({}, headers={"X-Request-Id": "theirs"})
    reply = await serve(answer)(json_body=HELLO)
    assert [name.lower() for name in reply.header_names].count("x-request-id") == 1
    assert reply.headers["x-request-id"].startswith("req_")


async def test_the_header_can_be_left_to_the_server_around() -> None:
    served = serve(set_request_id_header=False)
    reply = await served(json_body=HELLO, headers={"x-request-id": "mine"})
    assert "x-request-id" not in reply.headers
    assert served.inner.requests[0][1]["x-request-id"] == "mine"


class Slow:
    """An app that starts to answer when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.arrived = asyncio.Semaphore(0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        await request.body()
        self.arrived.release()
        await self.go.wait()
        await JSONResponse({"id": "x"})(scope, receive, send)


async def start(served: Any, slow: Slow, count: int) -> list[asyncio.Task[Reply]]:
    tasks = [asyncio.create_task(served(json_body=HELLO)) for _ in range(count)]
    for _ in range(count):
        await slow.arrived.acquire()
    return tasks


async def test_requests_over_the_limit_are_told_to_come_back() -> None:
    slow = Slow()
    served = serve(slow, max_concurrent_requests=2, retry_after_seconds=3)
    tasks = await start(served, slow, 2)
    assert served.gateway.in_flight == 2
    reply = await served(json_body=HELLO)
    assert (reply.status, reply.error["type"], reply.error["code"]) == (429, "requests", "rate_limit_exceeded")
    assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("3", "true")
    assert served.record.outcome == "shed"
    reply = await served(path="/v1/messages", json_body=HELLO)
    assert (reply.status, reply.error["type"]) == (429, "rate_limit_error")
    slow.go.set()
    assert [(await task).status for task in tasks] == [200, 200]
    assert served.gateway.in_flight == 0
    assert (await served(json_body=HELLO)).status == 200


async def test_at_the_limit_what_runs_no_model_still_passes() -> None:
    slow = Slow()
    served = serve(slow, max_concurrent_requests=1)
    tasks = await start(served, slow, 1)
    others = [
        asyncio.create_task(served("GET", "/v1/models")),
        asyncio.create_task(served("GET", "/health")),
        asyncio.create_task(served(path="/v1/messages/count_tokens", json_body=HELLO)),
    ]
    await asyncio.sleep(0.01)
    slow.go.set()
    assert [(await task).status for task in (*others, *tasks)] == [200] * 4


async def test_a_bad_request_takes_no_place() -> None:
    served = serve(RuntimeError("x"), max_concurrent_requests=1)
    for body in ({**HELLO, "n": 1000}, HELLO, HELLO):
        await served(json_body=body)
        assert served.gateway.in_flight == 0
    assert [record.status for record in served.records] == [400, 500, 500]


async def test_requests_whose_bodies_come_together_do_not_slip_in() -> None:
    slow = Slow()
    served = serve(slow, max_concurrent_requests=2)
    tasks = [asyncio.create_task(served(json_body=HELLO)) for _ in range(5)]
    await asyncio.sleep(0.01)
    slow.go.set()
    assert sorted([(await task).status for task in tasks]) == [200, 200, 429, 429, 429]


async def test_a_client_that_leaves_stops_the_app() -> None:
    produced = 0

    async def endless() -> Any:
        nonlocal produced
        while True:
            produced += 1
            yield chat_chunk("a")
            await asyncio.sleep(0)

    served = serve(StreamingResponse(endless(), media_type="text/event-stream"))
    reply = await asyncio.wait_for(served(json_body=STREAM, leave_after=3), 5)
    assert not reply.complete
    assert produced < 20
    assert (served.record.outcome, served.record.status) == ("disconnected", 200)
    assert served.record.ttft_seconds is not None
    assert served.gateway.in_flight == 0


@pytest.mark.parametrize("then", ["returns", "answers", "raises"])
async def test_a_client_that_leaves_before_the_answer_is_seen_by_the_app(then: str) -> None:
    """As vLLM's `with_cancellation` does: it waits for the disconnect beside the work, then answers `null`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        assert json.loads(await request.body()) == HELLO
        assert (await receive())["type"] == "http.disconnect"
        if then == "answers":
            await JSONResponse(None)(scope, receive, send)
        if then == "raises":
            raise RuntimeError

    served = serve(app)
    incoming: list[Any] = [
        {"type": "http.request", "body": json.dumps(HELLO).encode(), "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        assert then == "answers"

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
    }
    await served.gateway(scope, receive, send)
    record = served.record
    assert (record.outcome, record.status, record.ttft_seconds) == ("disconnected", 499, None)


async def test_a_client_that_leaves_while_it_asks() -> None:
    served = serve()
    reply = await served(chunks=[b'{"model"'], headers={"content-type": "application/json"}, leave_after=0)
    assert (reply.status, served.inner.requests) == (0, [])
    assert (served.record.outcome, served.record.status) == ("disconnected", 499)


@pytest.mark.parametrize("first_failure", [1, 2, 4])
async def test_a_server_that_cannot_send_means_the_same(first_failure: int) -> None:
    served = serve([chat_chunk("a")] * 5)

    async def receive() -> Any:
        if not served.inner.requests:
            return {"type": "http.request", "body": json.dumps(STREAM).encode(), "more_body": False}
        await asyncio.Event().wait()

    sent = 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent >= first_failure:
            raise ConnectionResetError

    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.4"},
        "method": "POST",
        "path": CHAT,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
    }
    await served.gateway(scope, receive, send)
    assert served.record.outcome == "disconnected"
    assert sent == first_failure


async def test_a_server_may_cancel() -> None:
    slow = Slow()
    served = serve(slow)
    (task,) = await start(served, slow, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert served.record.outcome == "disconnected"
    assert served.gateway.in_flight == 0


async def test_a_disconnect_after_the_end_is_none() -> None:
    """Servers report one when a response is complete."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await JSONResponse({})(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    served = serve(app)
    await served(json_body=HELLO)
    assert served.record.outcome == "ok"


async def test_the_access_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dflash_serve.access")
    served = serve([chat_chunk("the answer"), usage_chunk(), DONE], keys=["sk-secret"])
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"authorization": "Bearer sk-secret", "x-request-id": "mine", "traceparent": f"00-{trace}-{'b' * 16}-01"}
    await served(json_body=STREAM | {"user": "alice"}, headers=headers)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dflash_serve.access"]
    fields = json.loads(line)
    ttft_seconds, duration_seconds = fields.pop("ttft_seconds"), fields.pop("duration_seconds")
    assert 0 < ttft_seconds <= duration_seconds
    assert fields.pop("tpot_seconds") == pytest.approx((duration_seconds - ttft_seconds) / 6, abs=2e-6)
    assert fields == {
        "model": "demo",
        "request_id": "mine",
        "method": "POST",
        "route": CHAT,
        "status": 200,
        "outcome": "ok",
        "stream": True,
        "traffic_class": "other",
        "trace_id": trace,
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "num_drafts": 2,
        "draft_tokens": 8,
        "accepted_tokens": 5,
        "acceptance_length": 3.5,
    }
    for secret in ("hello", "the answer", "sk-secret", "alice"):
        assert secret not in caplog.text


async def test_probes_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    inner = Inner()
    served = serve(inner)
    await served("GET", "/health")
    assert caplog.records == []
    inner.status = 503
    await served("GET", "/health")
    assert "/health" in caplog.text


async def test_an_observer_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[RequestRecord] = []

    def observe(record: RequestRecord) -> None:
        seen.append(record)
        raise RuntimeError("broken metrics")

    gateway = Gateway(Inner(), GatewayConfig(), model_id="demo", observe=observe)
    assert (await call(gateway, json_body=HELLO)).status == 200
    assert len(seen) == 1
    assert "broken metrics" in caplog.text


async def test_it_can_go_without_an_observer() -> None:
    gateway = Gateway(Inner(), GatewayConfig(), model_id="demo")
    assert (await call(gateway, "GET", "/v1/models")).status == 200


async def test_a_closed_gateway_takes_no_more_and_lets_the_others_end() -> None:
    slow = Slow()
    served = serve(slow, retry_after_seconds=3)
    tasks = await start(served, slow, 2)
    served.gateway.close()
    reply = await served(json_body=HELLO)
    assert (reply.status, reply.error["type"], reply.error["code"]) == (503, "server_error", "service_unavailable")
    assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("3", "true")
    assert served.gateway.in_flight == 2
    slow.go.set()
    assert [(await task).status for task in tasks] == [200, 200]
    assert served.gateway.in_flight == 0


@pytest.mark.parametrize("name", ["serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id"])
async def test_rays_own_header_is_not_for_clients(name: str) -> None:
    served = serve({"ok": True})
    reply = await served(json_body=HELLO, headers={name: "adapter"})
    assert (reply.status, reply.error["code"]) == (400, "header_not_allowed")
    assert "serve_multiplexed_model_id" in reply.error["message"]
    assert served.record.outcome == "rejected"
