"""The same work again and again, beside a server that is suspended in turn."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.host_speed import Repetitions
from dflash_serve.bench.servers import ServerError, suspended


def test_what_took_longer_than_the_quick_ones_was_slowed() -> None:
    text = str(Repetitions(wall=[36.0] * 15 + [56.0] * 5, cpu=[53.0] + [35.0] * 15 + [53.0, 52.0, 53.0, 54.0]))
    assert text.startswith("20 times, ms: 10th percentile 36.0, median 36.0, 90th 56.0, largest 56.0")
    assert "CPU time: 10th percentile 35.0, median 35.0, 90th 53.0" in text
    assert "25% took more than 1.2 times" in text
    assert text.endswith("on median 53.0, at most 4 one after the other")
    assert str(Repetitions(wall=[36.0] * 9, cpu=[35.0] * 9)).endswith("90th 35.0")


def test_a_server_is_suspended_with_all_that_it_started_and_goes_on_after(request: pytest.FixtureRequest) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    server = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    request.addfinalizer(server.wait)
    request.addfinalizer(server.kill)
    assert server.stdout is not None
    processes = [psutil.Process(server.pid), psutil.Process(int(server.stdout.readline()))]
    request.addfinalizer(processes[1].kill)
    with suspended(server.pid):
        assert {process.status() for process in processes} == {psutil.STATUS_STOPPED}
    deadline = time.monotonic() + 10
    while any(process.status() == psutil.STATUS_STOPPED for process in processes):
        assert time.monotonic() < deadline, "they go on"
        time.sleep(0.01)


def test_it_does_not_suspend_itself() -> None:
    with pytest.raises(ServerError, match="our own family"), suspended(os.getpid()):
        pass
