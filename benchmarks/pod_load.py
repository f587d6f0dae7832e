"""Streams under failure: what each request came to, seen by a client behind a Kubernetes Service."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import httpx

Outcome = Literal["ok", "refused", "rejected", "lost", "truncated"]
"""refused: no connection, so nothing was accepted (a gateway tries the next pod). rejected: an error at once. lost: the
connection or the engine broke. truncated: it ended as if whole, without a finish reason."""


@dataclass(frozen=True)
class Request:
    """One request, and what became of it."""

    id: str
    pod: str
    started: float
    ended: float
    outcome: Outcome
    words: str = ""


@dataclass
class Load:
    """`width` streams at a time until told to stop; no retries, so that every failure shows."""

    url_of: Callable[[str], str]
    endpoints: Callable[[], list[str]]
    """The pods that are ready: what a Service sends to."""
    model: str
    key: str
    width: int
    max_tokens: int
    done: list[Request] = field(default_factory=list)
    without_endpoint_seconds: float = 0.0
    _stop: bool = False

    async def run(self) -> None:
        numbers = itertools.count()
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=httpx.Timeout(120, connect=2), limits=limits) as client:
            await asyncio.gather(*(self._stream_on(client, numbers) for _ in range(self.width)))

    def stop(self) -> None:
        self._stop = True

    def since(self, moment: float) -> list[Request]:
        """Requests that ended after `moment`."""
        return [request for request in self.done if request.ended >= moment]

    async def _stream_on(self, client: httpx.AsyncClient, numbers: Iterable[int]) -> None:
        numbers = iter(numbers)
        while not self._stop:
            ready = self.endpoints()
            if not ready:
                self.without_endpoint_seconds += 0.2
                await asyncio.sleep(0.2)
                continue
            pod, number, started = random.choice(ready), f"load-{next(numbers)}", time.monotonic()
            outcome, words = await self._stream(client, pod, number)
            self.done.append(Request(number, pod, started, time.monotonic(), outcome, words))
            if outcome != "ok":
                await asyncio.sleep(0.2)

    async def _stream(self, client: httpx.AsyncClient, pod: str, number: str) -> tuple[Outcome, str]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Write a short story about a lighthouse."}],
            "max_tokens": self.max_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        headers = {"Authorization": f"Bearer {self.key}", "x-request-id": number}
        try:
            async with client.stream(
                "POST", f"{self.url_of(pod)}/v1/chat/completions", json=body, headers=headers
            ) as answer:
                if answer.status_code != 200:
                    return "rejected", f"{answer.status_code} {(await answer.aread())[:200]!r}"
                finished = False
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return "lost", str(chunk["error"])[:200]
                    finished |= any(choice.get("finish_reason") for choice in chunk["choices"])
                return ("ok", "") if finished else ("truncated", "")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return "refused", repr(error)
        except httpx.HTTPError as error:
            return "lost", repr(error)
