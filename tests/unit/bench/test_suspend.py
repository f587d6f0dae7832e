"""Servers that are suspended while another is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from dflash_serve.bench.servers import ServerError, suspended


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
