"""One cell of a table: a task's conversations, so many at once, against one endpoint."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import psutil

from dflash_serve.bench.acceptance import Counters, between, parse_metrics
from dflash_serve.bench.client import Answer, Endpoint, EndpointError, ask, find_model, refusal
from dflash_serve.bench.samples import LatencyHistogram, Request, Sample
from dflash_serve.bench.tasks import Conversation
from dflash_serve.speculation.acceptance import AcceptanceCounts

WARM_UP: Conversation = ["Count from one to twenty."]
WARM_UP_TOKENS = 16
RAYS_METRICS = "\nray_"
RAYS_DELAY_SECONDS = 12.0
"""Ray's agents get counters every 10 s (`metrics_report_interval_ms`)."""


async def prepare(http: aiohttp.ClientSession, endpoint: Endpoint) -> Endpoint:
    """The endpoint with its model's name, and where its counters are when it has any.

    Raises EndpointError when it cannot be reached, or refuses such requests.
    """
    model, is_vllm = await find_model(http, endpoint)
    found = replace(endpoint, model=model, salted=is_vllm)
    refused = await refusal(http, found, [{"role": "user", "content": WARM_UP[0]}])
    if refused is not None:
        options = ", ".join(f"{name} {value}" for name, value in found.body.items())
        raise EndpointError(f"{found.base_url} refuses a request with {options}: {refused}")
    if found.metrics_url is None:
        page = replace(found, metrics_url=found.base_url.removesuffix("/v1") + "/metrics")
        return page if await _reachable(http, page) else found
    if not await _reachable(http, found):
        raise EndpointError(f"--metrics-url: nothing to read at {found.metrics_url}")
    return found


async def warm_up(http: aiohttp.ClientSession, endpoint: Endpoint, concurrency: int) -> None:
    """A short answer for each stream: kernels of this batch size are compiled, connections and caches made."""
    short = replace(endpoint, body={**endpoint.body, "max_tokens": WARM_UP_TOKENS})
    answers = await asyncio.gather(*(_converse(http, short, WARM_UP) for _ in range(concurrency)))
    errors = [answer.error for conversation in answers for answer in conversation if answer.error]
    if len(errors) == concurrency:
        raise EndpointError(f"{endpoint.base_url} fails every request: {errors[0]}")


async def measure(
    http: aiohttp.ClientSession,
    endpoint: Endpoint,
    conversations: list[Conversation],
    *,
    side: str,
    task: str,
    concurrency: int,
    number: int,
    bodies: Sequence[Mapping[str, Any]],
    server_cpu_seconds: Callable[[], float] | None = None,
    done: Callable[[], None] = lambda: None,
) -> Sample:
    """A conversation for each of `bodies`, from the first again when there are fewer; `concurrency` in flight.

    Args:
        bodies: Fields of the requests of each conversation.
        number: The round's.
        done: Called after each conversation.
    """
    waiting = deque(zip(itertools.cycle(conversations), bodies, strict=False))
    answers: list[Answer] = []

    async def stream() -> None:
        while waiting:
            turns, body = waiting.popleft()
            answers.extend(await _converse(http, replace(endpoint, body=body), turns))
            done()

    before = await _counters(http, endpoint)
    server_before = server_cpu_seconds() if server_cpu_seconds else 0.0
    machine_before = _machine_cpu_seconds()
    cpu_began, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(concurrency)))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    machine_seconds = _machine_cpu_seconds() - machine_before
    server_seconds = server_cpu_seconds() - server_before if server_cpu_seconds else None
    others = None if server_seconds is None else max(machine_seconds - server_seconds - cpu_seconds, 0.0)
    good = [answer for answer in answers if answer.error is None]
    acceptance = _added([a.acceptance for a in good if a.acceptance is not None])
    source = "responses" if acceptance else None
    if before is not None and (acceptance is None or not acceptance.accepted_per_position):
        after = await _counters(http, endpoint)
        counted = between(before, after, len(good)) if after is not None else None
        acceptance, source = (counted, "metrics") if counted else (acceptance, source)
    gaps = LatencyHistogram()
    for answer in good:
        gaps.add_all(answer.gaps_seconds)
    return Sample(
        side=side,
        task=task,
        concurrency=concurrency,
        round=number,
        seconds=seconds,
        model=endpoint.model,
        requests=[Request(a.prompt_tokens, a.completion_tokens, a.ttft_seconds, a.seconds, a.error) for a in answers],
        gaps=gaps,
        acceptance=acceptance,
        acceptance_source=source,
        client_cpu_share=cpu_seconds / seconds,
        server_cpu_seconds=server_seconds,
        other_cores=None if others is None else others / seconds,
    )


def _machine_cpu_seconds() -> float:
    """CPU time that all processes of the machine have had so far."""
    times = psutil.cpu_times()
    # Linux counts what runs at a niceness apart from `user`
    return float(times.user + times.system + getattr(times, "nice", 0.0))


async def _converse(http: aiohttp.ClientSession, endpoint: Endpoint, turns: Conversation) -> list[Answer]:
    """Each turn with the answers before it; stops at the first that fails."""
    messages: list[Any] = []
    answers: list[Answer] = []
    # of its own: a later turn may find its history in the prefix cache, the same prompt of another time may not
    salt = uuid.uuid4().hex
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = await ask(http, endpoint, messages, salt)
        answers.append(answer)
        if answer.error is not None:
            break
        messages.append({"role": "assistant", "content": answer.content})
    return answers


def _added(counts: list[AcceptanceCounts]) -> AcceptanceCounts | None:
    total = AcceptanceCounts()
    for one in counts:
        total.add(one.verifications, one.draft_tokens, one.accepted_tokens, one.accepted_per_position)
    return total if total.verifications else None


async def _counters(http: aiohttp.ClientSession, endpoint: Endpoint) -> Counters | None:
    """None without a page, or when it cannot be read: the server may have died, which its answers tell."""
    if endpoint.metrics_url is None:
        return None
    try:
        text = await _page(http, endpoint.metrics_url)
        if RAYS_METRICS in text:
            await asyncio.sleep(RAYS_DELAY_SECONDS)
            text = await _page(http, endpoint.metrics_url)
        return parse_metrics(text)
    except (aiohttp.ClientError, OSError, ValueError):
        return None


async def _page(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(url, timeout=aiohttp.ClientTimeout(total=10), raise_for_status=True) as response:
        return await response.text()


async def _reachable(http: aiohttp.ClientSession, endpoint: Endpoint) -> bool:
    assert endpoint.metrics_url is not None
    try:
        await _page(http, endpoint.metrics_url)
    except (aiohttp.ClientError, OSError):
        return False
    return True
