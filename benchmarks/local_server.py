"""The repository's serve_config.yaml served for tests and benchmarks, and where Ray puts its logs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from dflash_serve.bench.servers import COMMAND, START_SECONDS, Server, free_port, running, tail
from dflash_serve.monitoring.prometheus import DISCOVERY

__all__ = ["BIN", "MODEL", "ROOT", "Server", "replica_logs", "serving", "session_folder", "tail", "write_config"]

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MODEL = "smollm2-135m-instruct"


def write_config(path: Path, port: int, args: dict[str, Any], base: Path = ROOT / "serve_config.yaml") -> Path:
    """The repository's serve_config.yaml, or `base`, with another port and `args` laid over its own."""
    config = yaml.safe_load(base.read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"].update(args)
    path.write_text(yaml.safe_dump(config))
    return path


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
    program = [str(BIN / "serve"), "run"] if command == "run" else [*COMMAND, *command.split()]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    with running(
        [*program, str(config)],
        port,
        folder / "server.log",
        variables=variables | (environment or {}),
        folder=ROOT,
        # what service managers send; `serve run` knows only the other
        stop_signal=signal.SIGINT if command == "run" else signal.SIGTERM,
        start_seconds=start_seconds,
    ) as server:
        yield server


def session_folder(server: Server) -> Path:
    """The Ray session that the server's process started: the newest with its process id in the name."""
    # where Ray puts it depends on the variables that the server was started with, not on ours
    variables = psutil.Process(server.process.pid).environ()
    folder = Path(variables.get("RAY_TMPDIR", variables.get("TMPDIR", "/tmp"))) / "ray"
    sessions = sorted(folder.glob(f"session_*_{server.process.pid}"))
    return sessions[-1]


def metrics_discovery(server: Server) -> Path:
    """The file in which Ray lists the metrics addresses of the server's nodes."""
    return session_folder(server) / DISCOVERY


def replica_logs(server: Server) -> list[str]:
    """All log lines of the server's replicas so far."""
    files = (session_folder(server) / "logs" / "serve").glob("replica_*DFlashServer*.log")
    return [line for file in files for line in file.read_text(errors="replace").splitlines()]
