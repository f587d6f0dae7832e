"""A Prometheus of our own on this machine, and questions to any Prometheus."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from dflash_serve.monitoring import rules

DISCOVERY = "prom_metrics_service_discovery.json"
"""In a Ray session's folder: the metrics addresses of its nodes, kept up to date by Ray."""
SCRAPE_SECONDS = 10
"""As often as Ray's metrics move; oftener, and rates show teeth."""
START_SECONDS = 20
GET_IT = "run `python3 scripts/prometheus.py`, or install Prometheus (Debian, Ubuntu: apt-get install prometheus)"


class PrometheusError(RuntimeError):
    """Prometheus is missing, does not start, does not answer, or refuses a query; the text says what to do."""


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`: beside this Python, else on PATH. Raises PrometheusError when missing."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise PrometheusError(f"no {name} on this machine: {GET_IT}")
    return found


def configuration(
    discovery: list[Path], parameters: rules.RuleParameters, *, scrape_seconds: int = SCRAPE_SECONDS
) -> dict[str, str]:
    """File name -> content: prometheus.yml and the rules beside it.

    Args:
        discovery: Ray's discovery files; each is watched.
    """
    names = rules.groups(parameters)
    config = {
        "global": {
            "scrape_interval": f"{scrape_seconds}s",
            "evaluation_interval": rules.duration(parameters.evaluation_interval_seconds),
        },
        "rule_files": list(names),
        "scrape_configs": [
            {
                "job_name": "ray",
                "file_sd_configs": [{"files": [str(path) for path in discovery], "refresh_interval": "5s"}],
                "metric_relabel_configs": [{"regex": "otel_scope_.*|Version", "action": "labeldrop"}],
            }
        ],
    }
    return {"prometheus.yml": yaml.safe_dump(config, sort_keys=False)} | {
        name: rules.render(content) for name, content in names.items()
    }


@contextlib.contextmanager
def running(
    folder: Path,
    discovery: list[Path],
    *,
    parameters: rules.RuleParameters | None = None,
    port: int = 0,
    scrape_seconds: int = SCRAPE_SECONDS,
) -> Iterator[Prometheus]:
    """A Prometheus on 127.0.0.1 that scrapes a Ray session, until the block ends.

    Args:
        folder: For its configuration, its data and its log.
        port: 0 takes a free one.

    Raises PrometheusError when it is missing or does not start.
    """
    binary = program("prometheus")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in configuration(
        discovery, parameters or rules.RuleParameters(), scrape_seconds=scrape_seconds
    ).items():
        (folder / name).write_text(content, encoding="utf-8")
    port = port or _free_port()
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_SECONDS
        while not server.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise PrometheusError(f"Prometheus did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Sample:
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Series:
    labels: dict[str, str]
    points: list[tuple[float, float]]
    """(Unix seconds, value)"""


@dataclass(frozen=True)
class Prometheus:
    """Prometheus' HTTP API. Its methods raise PrometheusError."""

    url: str

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def query(self, expression: str) -> list[Sample]:
        """The present values of an expression."""
        data = self._get("query", query=expression)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(item["metric"], float(item["value"][1])) for item in data["result"]]

    def query_range(self, expression: str, start: float, end: float, step_seconds: float) -> list[Series]:
        """Values from `start` to `end` (Unix seconds), series sorted by label."""
        data = self._get("query_range", query=expression, start=start, end=end, step=step_seconds)
        return [Series(item["metric"], [(at, float(value)) for at, value in item["values"]]) for item in data["result"]]

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that are pending or firing."""
        found: list[dict[str, Any]] = self._get("alerts")["alerts"]
        return found

    def healthy_targets(self) -> int:
        """Targets whose last scrape went well."""
        return sum(target["health"] == "up" for target in self._get("targets")["activeTargets"])

    def _get(self, path: str, **parameters: str | float) -> Any:
        try:
            # a form: expressions are longer than some proxies take in a URL
            method = "POST" if parameters else "GET"
            reply = httpx.request(method, f"{self.url}/api/v1/{path}", data=parameters, timeout=30)
            body = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise PrometheusError(f"no Prometheus at {self.url}: {error}") from None
        if body.get("status") != "success":
            raise PrometheusError(f"{self.url} refuses the query: {body.get('error')}")
        return body["data"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
