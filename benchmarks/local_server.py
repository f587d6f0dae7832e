"""Starts the real thing, as a user would, and stops it by its own process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from dflash_serve.monitoring.prometheus import DISCOVERY

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# the first start on a new GPU node, nothing compiled or cached, took 201 s
START_SECONDS = 300
STOP_SECONDS = 90
MODEL = "smollm2-135m-instruct"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_config(path: Path, port: int, args: dict[str, Any], base: Path = ROOT / "serve_config.yaml") -> Path:
    """The repository's serve_config.yaml, or `base`, with another port and `args` laid over its own."""
    config = yaml.safe_load(base.read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"].update(args)
    path.write_text(yaml.safe_dump(config))
    return path


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
        options = {"max_retries": 0, "timeout": 120.0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options)

    def async_client(self, api_key: str = "unused", **options: Any) -> openai.AsyncOpenAI:
        options = {"max_retries": 0, "timeout": 300.0} | options
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options)


@contextlib.contextmanager
def serving(
    folder: Path,
    args: dict[str, Any],
    *,
    command: str = "up",
    environment: dict[str, str] | None = None,
    base: Path = ROOT / "serve_config.yaml",
    start_seconds: float = START_SECONDS,
) -> Iterator[Server]:
    """`dflash-serve up` (command "up", or "up --plain") or `serve run` (command "run") until the block ends."""
    port = free_port()
    config = write_config(folder / "serve_config.yaml", port, args, base)
    ours = [sys.executable, "-c", "from dflash_serve.cli import main; main()", *command.split()]
    program = [str(BIN / "serve"), "run"] if command == "run" else ours
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    log = folder / "server.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*program, str(config)],
            cwd=ROOT,
            env=variables | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(port, process, log)
        _wait_until_ready(server, start_seconds)
        server.start_seconds = time.monotonic() - started
        yield server
    finally:
        # what service managers send; `serve run` knows only the other
        process.send_signal(signal.SIGINT if command == "run" else signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    if command != "run" and process.returncode != 0:
        raise AssertionError(f"the server stopped with {process.returncode}:\n{tail(log)}")


def _wait_until_ready(server: Server, seconds: float) -> None:
    """Until a replica answers: `/health` does so earlier, without one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended with {server.process.returncode}:\n{tail(server.log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/v1/models", timeout=2).status_code in (200, 401):
                return
        time.sleep(0.25)
    raise AssertionError(f"no answer after {seconds:.0f} s:\n{tail(server.log)}")


def tail(path: Path, characters: int = 4000) -> str:
    return path.read_text(errors="replace")[-characters:]


def session_folder(server: Server) -> Path:
    """The Ray session that the server's process started: the newest with its process id in the name."""
    sessions = sorted(Path("/tmp/ray").glob(f"session_*_{server.process.pid}"))
    return sessions[-1]


def metrics_discovery(server: Server) -> Path:
    """The file in which Ray lists the metrics addresses of the server's nodes."""
    return session_folder(server) / DISCOVERY


def replica_logs(server: Server) -> list[str]:
    """All log lines of the server's replicas so far."""
    files = (session_folder(server) / "logs" / "serve").glob("replica_*DFlashServer*.log")
    return [line for file in files for line in file.read_text(errors="replace").splitlines()]
