"""One streamed chat completion, measured, over plain HTTP.

aiohttp and a dozen lines of event parsing rather than OpenAI's SDK: 5 µs of CPU a chunk against 95 (measured), and at
128 streams the client would be what is measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from dflash_serve.bench.acceptance import from_response
from dflash_serve.speculation.acceptance import AcceptanceCounts

TEXT_FIELDS = ("content", "reasoning", "reasoning_content")
ERROR_CHARACTERS = 300


class EndpointError(RuntimeError):
    """The endpoint cannot be measured: out of reach, or it serves no model."""


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI API is, and what is sent with every request."""

    base_url: str
    """Ends in `/v1`."""
    model: str = ""
    api_key: str = "none"
    body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request's body."""
    salted: bool = False
    """The server takes vLLM's `cache_salt`: a prompt sent again is then no cache hit."""
    metrics_url: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}


@dataclass
class Answer:
    """One measured request. Times in seconds from when it was sent."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_seconds: float | None = None
    """To the first event with output; None when none came."""
    seconds: float = 0.0
    """To the end of the stream."""
    gaps_seconds: list[float] = field(default_factory=list)
    """Between events with output: with speculation each carries several tokens."""
    acceptance: AcceptanceCounts | None = None
    error: str | None = None
    text: str = ""


def session() -> aiohttp.ClientSession:
    """No limit of connections, and none of time: a long answer is no failure."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=30)
    )


async def find_model(http: aiohttp.ClientSession, endpoint: Endpoint) -> tuple[str, bool]:
    """The first model that the endpoint serves, and whether vLLM serves it."""
    url = f"{endpoint.base_url}/models"
    try:
        async with http.get(url, headers=endpoint.headers, timeout=aiohttp.ClientTimeout(total=10)) as response:
            body = await response.json(content_type=None)
            if response.status != 200:
                hint = "; give the name of a variable with a key by --api-key-env" if response.status == 401 else ""
                raise EndpointError(f"{url} answers {response.status}{hint}")
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise EndpointError(f"{url}: {error or type(error).__name__}") from None
    try:
        model = next((m for m in body["data"] if m["id"] == endpoint.model), body["data"][0])
        return endpoint.model or model["id"], model.get("owned_by") == "vllm"
    except (KeyError, IndexError, TypeError):
        raise EndpointError(f"{url} lists no model") from None


async def ask(http: aiohttp.ClientSession, endpoint: Endpoint, messages: list[Any], salt: str) -> Answer:
    """Stream one answer. A request that fails is an Answer with `error`, never an exception."""
    body = {
        "model": endpoint.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **endpoint.body,
    }
    if endpoint.salted:
        body["cache_salt"] = salt
    answer = Answer()
    parts: list[str] = []
    usage = False
    started = last = time.perf_counter()
    try:
        async with http.post(f"{endpoint.base_url}/chat/completions", json=body, headers=endpoint.headers) as response:
            if response.status != 200:
                said = (await response.text())[:ERROR_CHARACTERS]
                answer.error = f"{response.status}: {said}"
                return answer
            async for data in events(response.content.iter_any()):
                event = json.loads(data)
                if "error" in event:
                    answer.error = str(event["error"])[:ERROR_CHARACTERS]
                    return answer
                if event.get("choices"):
                    text = output_of(event["choices"][0])
                    if text is not None:
                        now = time.perf_counter()
                        if answer.ttft_seconds is None:
                            answer.ttft_seconds = now - started
                        else:
                            answer.gaps_seconds.append(now - last)
                        last = now
                        parts.append(text)
                if event.get("usage"):
                    usage = True
                    answer.prompt_tokens = event["usage"].get("prompt_tokens") or 0
                    answer.completion_tokens = event["usage"].get("completion_tokens") or 0
                    answer.acceptance = from_response(event)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
        return answer
    answer.seconds = time.perf_counter() - started
    answer.text = "".join(parts)
    if answer.ttft_seconds is None or not usage:
        answer.error = "the stream ended without " + ("usage" if answer.ttft_seconds is not None else "output")
    return answer


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, `[DONE]` and comments left out."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data != b"[DONE]":
                    yield data


def output_of(choice: Mapping[str, Any]) -> str | None:
    """The text of a stream's choice; None for one that carries no output: the role at the start, the reason at the end.

    Output may be empty text: a token that is part of a character, or that the tokenizer does not print.
    """
    delta = choice.get("delta") or {}
    text = "".join(delta[name] for name in TEXT_FIELDS if delta.get(name))
    if text or delta.get("tool_calls"):
        return text
    return None if delta.get("role") or choice.get("finish_reason") else ""
