"""More than one replica: scaling with load, and an engine killed under load."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import openai
import psutil
import pytest

from benchmarks.local_server import MODEL, Server, serving
from tests.integration.conftest import API_KEYS

pytestmark = pytest.mark.integration

SCALE_SECONDS = 240
"""Two engines that start on two cores under load take their time."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = {
        "auth": {"keys_env": "DFLASH_TEST_KEYS"},
        "autoscaling": {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 5},
        "limits": {"max_stream_seconds": 60},
    }
    folder = tmp_path_factory.mktemp("fleet")
    with serving(folder, args, environment={"DFLASH_TEST_KEYS": API_KEYS[0]}) as running:
        yield running


def engines(server: Server) -> list[psutil.Process]:
    """The engine core process of each replica."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if "EngineCore" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass
class Load:
    """Streams, `width` at a time, until told to stop; no retries, so that every failure shows."""

    server: Server
    width: int
    stop: bool = False
    finished: list[float] = field(default_factory=list)
    failed: list[tuple[float, str]] = field(default_factory=list)
    truncated: int = 0

    async def run(self) -> None:
        client = self.server.async_client(API_KEYS[0], timeout=120.0)

        async def worker() -> None:
            while not self.stop:
                try:
                    stream = await client.chat.completions.create(
                        model=MODEL,
                        messages=[{"role": "user", "content": "Write a short story about a lighthouse."}],
                        max_tokens=48,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                    reason = None
                    async for chunk in stream:
                        reason = chunk.choices[0].finish_reason or reason
                    if reason is None:
                        self.truncated += 1
                    else:
                        self.finished.append(time.monotonic())
                except (openai.APIError, OSError) as error:
                    self.failed.append((time.monotonic(), repr(error)[:200]))
                    await asyncio.sleep(0.5)

        await asyncio.gather(*(worker() for _ in range(self.width)))


async def wait_for(server: Server, count: int, seconds: float = SCALE_SECONDS) -> float:
    """Seconds until `count` engines run; fails after `seconds`."""
    started = time.monotonic()
    while len(engines(server)) != count:
        assert time.monotonic() - started < seconds, f"{len(engines(server))} engines, not {count}, after {seconds} s"
        await asyncio.sleep(0.5)
    return time.monotonic() - started


async def until_both_serve(load: Load, seconds: int = 90) -> None:
    """Some more finished streams after the second engine came: it serves by then."""
    before = len(load.finished)
    for _ in range(2 * seconds):
        if len(load.finished) >= before + 20:
            return
        await asyncio.sleep(0.5)


async def test_scales_up_survives_a_killed_engine_and_scales_down(fleet: Server) -> None:
    assert len(engines(fleet)) == 1
    load = Load(fleet, width=6)
    running = asyncio.create_task(load.run())
    try:
        up_seconds = await wait_for(fleet, 2)
        await until_both_serve(load)
        assert load.failed == []
        assert load.truncated == 0
        print(f"1 -> 2 engines {up_seconds:.0f} s after load began; {len(load.finished)} streams, none failed")

        victim = engines(fleet)[0]
        finished_before = len(load.finished)
        killed = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        while len(load.finished) < finished_before + 6:
            assert time.monotonic() - killed < 120, "nothing finished after the kill"
            await asyncio.sleep(0.2)
        replaced_seconds = await wait_for(fleet, 2)
        await until_both_serve(load)
        last_failure = max((at for at, _ in load.failed), default=killed) - killed
        print(
            f"engine killed under load: {len(load.failed)} streams failed, the last {last_failure:.1f} s after it; "
            f"{len(load.finished) - finished_before} finished since; two engines again after {replaced_seconds:.0f} s"
        )
        assert load.truncated == 0, "a stream of a dead engine must end with an error, not just end"
        assert last_failure < 20, load.failed
        # the streams of the killed engine, and what its replica was sent until the router knew
        assert len(load.failed) <= 2 * load.width, load.failed
    finally:
        load.stop = True
        await running
    down_seconds = await wait_for(fleet, 1)
    print(f"2 -> 1 engine {down_seconds:.0f} s after load ended")
    answer = await fleet.async_client(API_KEYS[0]).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert answer.choices[0].message
