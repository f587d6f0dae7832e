"""More than one replica: scaling up and down under load, and an engine killed under load."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
import pytest

from benchmarks.local_server import MODEL, Server, serving, session_folder
from tests.integration.conftest import API_KEYS

pytestmark = pytest.mark.integration

SCALE_SECONDS = 240
"""Two engines that start on two cores under load take their time."""


ENGINE_GONE_SECONDS = 20


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


def requests_in(log: Path) -> set[str]:
    """Ids of the load's requests in a replica's log."""
    return set(re.findall(r"fleet-\d+", log.read_text(errors="replace")))


def log_of(engine: psutil.Process) -> Path:
    """The log of the replica that the engine belongs to."""
    for process in engine.parents():
        for file in process.open_files():
            if re.search(r"/serve/replica_.*DFlashServer.*\.log$", file.path):
                return Path(file.path)
    raise AssertionError(f"no replica among the parents of process {engine.pid}")


@dataclass(frozen=True)
class Failure:
    """A request that did not end well."""

    id: str
    at: float
    words: str


@dataclass
class Load:
    """Streams, `width` at a time, until that is 0; no retries, so that every failure shows."""

    server: Server
    width: int
    finished: list[float] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    truncated: int = 0

    async def run(self) -> None:
        client = self.server.async_client(API_KEYS[0], timeout=120.0)
        numbers = itertools.count()

        async def worker(place: int) -> None:
            while place < self.width:
                request_id = f"fleet-{next(numbers)}"
                try:
                    stream = await client.chat.completions.create(
                        model=MODEL,
                        messages=[{"role": "user", "content": "Write a short story about a lighthouse."}],
                        max_tokens=48,
                        stream=True,
                        extra_body={"ignore_eos": True},
                        extra_headers={"x-request-id": request_id},
                    )
                    reason = None
                    async for chunk in stream:
                        reason = chunk.choices[0].finish_reason or reason
                    if reason is None:
                        self.truncated += 1
                    else:
                        self.finished.append(time.monotonic())
                except (openai.APIError, OSError) as error:
                    self.failed.append(Failure(request_id, time.monotonic(), repr(error)[:200]))
                    await asyncio.sleep(0.5)

        await asyncio.gather(*(worker(place) for place in range(self.width)))


async def wait_for(server: Server, count: int, seconds: float = SCALE_SECONDS) -> float:
    """Seconds until `count` engines run; fails after `seconds`."""
    started = time.monotonic()
    while len(engines(server)) != count:
        assert time.monotonic() - started < seconds, f"{len(engines(server))} engines, not {count}, after {seconds} s"
        await asyncio.sleep(0.5)
    return time.monotonic() - started


async def until_more_finish(load: Load, count: int, seconds: float = 90) -> None:
    """`count` more streams end well; after a second engine came, both serve by then."""
    before, started = len(load.finished), time.monotonic()
    while len(load.finished) < before + count:
        assert time.monotonic() - started < seconds, f"{len(load.finished) - before} streams in {seconds} s"
        await asyncio.sleep(0.2)


async def test_scales_survives_a_killed_engine_and_drains(
    fleet: Server, record_property: Callable[[str, object], None]
) -> None:
    assert len(engines(fleet)) == 1
    assert not list(session_folder(fleet).glob("logs/serve/replica_*_LLMRouter_*.log")), "HAProxy needs no router"
    load = Load(fleet, width=6)
    running = asyncio.create_task(load.run())
    try:
        up_seconds = await wait_for(fleet, 2)
        await until_more_finish(load, 20)
        assert load.failed == []
        assert load.truncated == 0
        record_property("1 -> 2 engines under load, seconds", round(up_seconds))

        victim = engines(fleet)[0]
        victims_log = log_of(victim)
        finished_before = len(load.finished)
        killed = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        await until_more_finish(load, 6, 120)
        replaced_seconds = await wait_for(fleet, 2)
        await until_more_finish(load, 20)
        finished_since = [at - killed for at in load.finished[finished_before:]]
        last_failure = max((failure.at for failure in load.failed), default=killed) - killed
        elsewhere = {
            request_id
            for log in victims_log.parent.glob("replica_*DFlashServer*.log")
            if log != victims_log
            for request_id in requests_in(log)
        }
        on_victim = requests_in(victims_log)
        record_property("engine killed: streams that failed", len(load.failed))
        record_property("engine killed: of them on its replica", len({f.id for f in load.failed} & on_victim))
        record_property("engine killed: the next stream ended after, seconds", round(min(finished_since), 1))
        record_property("engine killed: the last failure after, seconds", round(last_failure, 1))
        record_property("engine killed: two engines again after, seconds", round(replaced_seconds))
        assert load.truncated == 0, "a stream of a dead engine must end with an error, not just end"
        assert last_failure < 20, load.failed
        assert [f for f in load.failed if f.id in elsewhere] == [], "the other replica lost a request"
        # the streams of the killed engine: its replica ends with it, so that nothing more is sent there
        assert len(load.failed) <= load.width, load.failed

        # so little that one replica does: the other drains while requests go on
        failures_before, load.width = len(load.failed), 2
        down_seconds = await wait_for(fleet, 1)
        await until_more_finish(load, 6)
        record_property("2 -> 1 engine under load, seconds", round(down_seconds))
        assert load.failed[failures_before:] == [], "scaling down must let requests end"
        assert load.truncated == 0
    finally:
        load.width = 0
        await running


def test_the_engine_of_a_killed_replica_goes_with_it(fleet: Server) -> None:
    """It would keep the GPU that the next replica waits for; Ray ends it, as vLLM's engine outlives its parent."""
    (engine,) = engines(fleet)
    (replica,) = (process for process in engine.parents() if "ServeReplica" in " ".join(process.cmdline()))
    processes = [engine, *engine.children(recursive=True)]
    os.kill(replica.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, ENGINE_GONE_SECONDS)
    assert not alive
