"""One streamed chat completion, measured, over plain HTTP.

aiohttp and a dozen lines of event parsing rather than OpenAI's SDK: 5 µs of CPU a chunk against 95 (measured), and at
128 streams the client would be what is measured.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from dflash_serve.bench.acceptance import from_response
from dflash_serve.speculation.acceptance import AcceptanceCounts

OUTPUT_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls")
ERROR_CHARACTERS = 300
HINTS = {
    401: "; give the name of a variable with a key by --api-key-env",
    404: "; the URL of an OpenAI API ends in /v1",
}


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
    """To the first event with output; None when none came, or only the end of several tokens that have no text."""
    seconds: float = 0.0
    """To the end of the stream."""
    gaps_seconds: list[float] = field(default_factory=list)
    """Between events with output: with speculation each carries several tokens."""
    acceptance: AcceptanceCounts | None = None
    error: str | None = None
    content: str = ""
    """What a next turn has as history: chat templates leave earlier reasoning out."""


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
            status, text = response.status, await response.text(errors="replace")
    except (aiohttp.ClientError, OSError) as error:
        raise EndpointError(f"{url}: {str(error) or type(error).__name__}; is a server there?") from None
    if status != 200:
        raise EndpointError(f"{url} answers {status}{HINTS.get(status, '')}")
    try:
        listed = json.loads(text)["data"]
        model = next((m for m in listed if m["id"] == endpoint.model), listed[0])
        return endpoint.model or model["id"], model.get("owned_by") == "vllm"
    except (ValueError, KeyError, IndexError, TypeError):
        raise EndpointError(f"{url} lists no model; the URL must be an OpenAI API's, which ends in /v1") from None


async def refusal(http: aiohttp.ClientSession, endpoint: Endpoint, messages: list[Any]) -> str | None:
    """What the server says against such a request; None when it begins to answer, which is not waited for."""
    try:
        async with _post(http, endpoint, messages, uuid.uuid4().hex) as response:
            return None if response.status == 200 else await _said(response)
    except (aiohttp.ClientError, OSError) as error:
        return _named(error)


async def ask(http: aiohttp.ClientSession, endpoint: Endpoint, messages: list[Any], salt: str) -> Answer:
    """Stream one answer. A request that fails is an Answer with `error`, never an exception.

    Requests of one `salt` may find each other's prompts in the prefix cache.
    """
    answer = Answer()
    parts: list[str] = []
    usage = shown = False
    started = last = time.perf_counter()
    try:
        async with _post(http, endpoint, messages, salt) as response:
            if response.status != 200:
                answer.error = await _said(response)
                return answer
            async for data in events(response.content.iter_any()):
                event = json.loads(data)
                if "error" in event:
                    answer.error = str(event["error"])[:ERROR_CHARACTERS]
                    return answer
                if event.get("choices") and has_output(
                    choice := event["choices"][0], first=answer.ttft_seconds is None
                ):
                    now = time.perf_counter()
                    if answer.ttft_seconds is None:
                        answer.ttft_seconds = now - started
                        shown = has_output(choice, first=False)
                    else:
                        answer.gaps_seconds.append(now - last)
                    last = now
                    parts.append((choice.get("delta") or {}).get("content") or "")
                if event.get("usage"):
                    usage = True
                    answer.prompt_tokens = event["usage"].get("prompt_tokens") or 0
                    answer.completion_tokens = event["usage"].get("completion_tokens") or 0
                    answer.acceptance = from_response(event)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        answer.error = _named(error)
        return answer
    answer.seconds = time.perf_counter() - started
    answer.content = "".join(parts)
    if answer.ttft_seconds is None or not usage:
        answer.error = "the stream ended without " + ("usage" if answer.ttft_seconds is not None else "output")
    elif not shown and answer.completion_tokens > 1:
        answer.ttft_seconds = None
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


def has_output(choice: Mapping[str, Any], *, first: bool) -> bool:
    """Whether a stream's choice carries output, and not only the role at the start or the reason at the end.

    Output may be empty text: a token that is part of a character, or that the tokenizer does not print. `first`: none
    came before; the reason alone is then an answer that ended with its first token.
    """
    delta = choice.get("delta") or {}
    if any(delta.get(name) for name in OUTPUT_FIELDS):
        return True
    if choice.get("finish_reason"):
        return first
    return not delta.get("role")


def _post(
    http: aiohttp.ClientSession, endpoint: Endpoint, messages: list[Any], salt: str
) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    body = {
        "model": endpoint.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **endpoint.body,
    }
    if endpoint.salted:
        body["cache_salt"] = salt
    return http.post(f"{endpoint.base_url}/chat/completions", json=body, headers=endpoint.headers)


async def _said(response: aiohttp.ClientResponse) -> str:
    """Status and message of an error, OpenAI's or whatever it is."""
    text = await response.text(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return f"{response.status}: {text[:ERROR_CHARACTERS]}"


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
