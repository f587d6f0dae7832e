"""What the gateway costs: microseconds for a streamed chunk and for a request, with and without it, in one run.

    python -m benchmarks.gateway_overhead

The app behind it sends ready-made bytes shaped as vLLM's, and there is no network: the difference is the gateway
alone. Both sides alternate, and each figure is the best of the repeats, so that other work on the machine weighs on
both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from dflash_serve.gateway import ApiKeys, Gateway, GatewayConfig

App = Callable[[Any, Any, Any], Awaitable[None]]

HEADERS = [
    (b"host", b"localhost:8000"),
    (b"authorization", b"Bearer sk-second"),
    (b"content-type", b"application/json"),
    (b"user-agent", b"bench"),
    (b"accept", b"application/json"),
]
SPECULATION = {"num_spec_steps": 100, "num_accepted_draft_tokens": 300, "num_draft_tokens": 700}


def body(*, stream: bool, prompt_chars: int) -> bytes:
    request = {"model": "demo", "messages": [{"role": "user", "content": "x" * prompt_chars}], "stream": stream}
    return json.dumps(request).encode()


def event(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None, "token_ids": None}
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_800_000_000,
        "model": "demo",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def streaming_app(num_chunks: int) -> App:
    usage = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": num_chunks},
        "metrics": {"speculative_decoding": SPECULATION},
    }
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    chunks = [event(f" word{i}") for i in range(num_chunks)]
    chunks += [b"data: " + json.dumps(usage, separators=(",", ":")).encode() + b"\n\n", b"data: [DONE]\n\n"]
    messages = [{"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks]
    end = {"type": "http.response.body", "body": b"", "more_body": False}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start)
        for message in messages:
            await send(message)
        await send(end)

    return app


def json_app() -> App:
    answer = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 400}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 400, "completion_tokens_details": None},
        "metrics": {"speculative_decoding": SPECULATION},
    }
    text = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": False})

    return app


async def seconds_per_request(app: App, request: bytes, num_requests: int) -> float:
    async def receive() -> Any:
        return {"type": "http.request", "body": request, "more_body": False}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "root_path": "",
        "query_string": b"",
        "headers": HEADERS,
        "client": ("127.0.0.1", 50000),
    }
    begin = time.perf_counter()
    for _ in range(num_requests):
        await app(dict(scope), receive, send)
    return (time.perf_counter() - begin) / num_requests


async def compare(app: App, request: bytes, num_requests: int, repeats: int) -> tuple[float, float]:
    """Seconds a request without and with the gateway."""
    config = GatewayConfig(api_keys=ApiKeys(["sk-first", "sk-second"]), max_output_tokens=4096)
    gateway = Gateway(app, config, model_id="demo", observe=lambda record: None)
    bare, wrapped = [], []
    for _ in range(repeats):
        gc.collect()
        bare.append(await seconds_per_request(app, request, num_requests))
        wrapped.append(await seconds_per_request(gateway, request, num_requests))
    return min(bare), min(wrapped)


def report(name: str, bare_seconds: float, wrapped_seconds: float) -> None:
    bare, wrapped = bare_seconds * 1e6, wrapped_seconds * 1e6
    print(f"{name:44} {bare:9.2f} {wrapped:9.2f} {wrapped - bare:+9.2f}")


async def run(num_chunks: int, repeats: int) -> None:
    print(f"{'microseconds':44} {'without':>9} {'with':>9} {'gateway':>9}")
    for name, prompt_chars in (("request, short prompt", 100), ("request, 100 kB prompt", 100_000)):
        request = body(stream=False, prompt_chars=prompt_chars)
        report(f"JSON {name}, 2 kB answer", *await compare(json_app(), request, 200, repeats))
    request = body(stream=True, prompt_chars=100)
    empty = await compare(streaming_app(0), request, 200, repeats)
    report("streamed request without content", *empty)
    full = await compare(streaming_app(num_chunks), request, 5, repeats)
    chunk = [(whole - fixed) / num_chunks for whole, fixed in zip(full, empty, strict=True)]
    report("one streamed chunk", chunk[0], chunk[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chunks", type=int, default=2000, help="content chunks of a stream (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="repeats; the best counts (default: %(default)s)")
    options = parser.parse_args()
    access_log = logging.getLogger("dflash_serve.access")  # written as in service, to nowhere
    access_log.setLevel(logging.INFO)
    access_log.addHandler(logging.NullHandler())
    access_log.propagate = False
    asyncio.run(run(options.chunks, options.repeats))


if __name__ == "__main__":
    main()
