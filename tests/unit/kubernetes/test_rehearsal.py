"""The rehearsal of failures starts what the manifest says, and counts what clients saw."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pod_failures import account, container_environment, nice_for, ray_start, settled
from benchmarks.pod_load import Load, Outcome, Request
from benchmarks.pods import Pod
from tests.unit.kubernetes.rendered import Resource, head, one, overlay, workers

SERVICE: Resource = one(overlay("cpu-demo"), "RayService")


def test_the_operator_s_commands_come_from_the_manifest() -> None:
    command = ray_start(head(SERVICE), head=True)
    assert command[:3] == ["ray", "start", "--head"]
    assert {"--num-cpus=0", "--memory=3221225472", "--metrics-export-port=8080"} <= set(command)
    worker = ray_start(workers(SERVICE), head=False)
    assert {"--address=dflash-head-svc:6379", "--num-cpus=1"} <= set(worker)
    assert container_environment(head(SERVICE))["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


@pytest.mark.parametrize(("cpus", "nice"), [(2, 0), (1, 3), (0.5, 6)])
def test_niceness_stands_for_requested_cpus(cpus: float, nice: int) -> None:
    assert nice_for(cpus, 2) == nice


def test_a_request_is_lost_outside_when_neither_its_proxy_nor_its_replica_was_killed() -> None:
    now = time.monotonic()
    victim = Pod("gone", "10.0.0.2", Path(), {}, process=None)  # type: ignore[arg-type]
    load = Load(url_of=str, endpoints=list, model="m", key="k", width=1, max_tokens=1)

    def ended(name: str, pod: str, outcome: Outcome, *, started: float, after: float) -> None:
        load.done.append(Request(name, pod, now + started, now + after, outcome))

    ended("before", "stays", "lost", started=-9, after=-5)
    ended("by its proxy", "gone", "lost", started=-1, after=1)
    ended("by both", "gone", "lost", started=-1, after=1)
    ended("by its replica", "stays", "lost", started=-1, after=2)
    ended("elsewhere", "stays", "lost", started=-1, after=3)
    ended("at once", "gone", "refused", started=1, after=1)
    ended("old", "stays", "ok", started=-1, after=0.5)
    ended("new", "stays", "ok", started=1, after=4)

    def on_survivor(request: Any) -> bool:
        return request.id in ("elsewhere", "by its proxy")

    found = account("killed", load, now, now + 10, on_survivor, victim)
    assert found.recovered_seconds == 10.0
    assert (found.lost, found.lost_by_proxy, found.lost_outside) == (4, 1, 1)
    assert (found.refused, found.finished) == (1, 2)
    assert (found.next_end_seconds, found.first_answer_seconds) == (0.5, 4.0)
    assert found.last_failure_seconds == 3.0
    assert len(found.words) == 4
    assert account("head", load, now, now + 10).lost_outside == 4, "nothing of theirs was killed"


async def test_failures_right_after_the_recovery_count_too() -> None:
    load = Load(url_of=str, endpoints=list, model="m", key="k", width=2, max_tokens=1)
    moment = time.monotonic()

    async def stream() -> None:
        for number, outcome in enumerate(["rejected", "ok", "ok", "rejected", "ok", "ok"]):
            await asyncio.sleep(0.01)
            load.done.append(Request(str(number), "pod", time.monotonic(), time.monotonic(), outcome))  # type: ignore[arg-type]

    streams = asyncio.create_task(stream())
    recovered = await settled(load)
    await streams
    found = account("killed", load, moment, recovered)
    assert (found.finished, found.rejected) == (4, 2)
    assert found.recovered_seconds == 0.0
