"""`make monitor`: Prometheus, and Grafana where it is installed, for the Ray session of this machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Console

from dflash_serve.monitoring import latest_session
from dflash_serve.monitoring.prometheus import DISCOVERY, Prometheus, PrometheusError, running
from dflash_serve.monitoring.rules import read_parameters

DASHBOARDS = Path(__file__).parents[2] / "monitoring" / "dashboards"
GRAFANA_HOMES = (Path("/usr/share/grafana"), Path("/usr/local/share/grafana"))


def main() -> int:
    """Run until interrupted. Returns the exit status: 1 when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m dflash_serve.monitoring.local", description=__doc__)
    parser.add_argument("--session", type=Path, default=latest_session(), help="folder of the Ray session")
    parser.add_argument("--port", type=int, default=9090, help="Prometheus' port on this machine (default 9090)")
    parser.add_argument("--grafana-port", type=int, default=3000, help="Grafana's port (default 3000)")
    options = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, _interrupt)
    discovery: Path = options.session / DISCOVERY
    if not discovery.exists():
        console.print(f"[yellow]no Ray session yet[/yellow] ({discovery}); it is found when `make serve` starts one")
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            running(Path(folder), [discovery], parameters=read_parameters(), port=options.port) as prometheus,
        ):
            console.print(f"[green]Prometheus[/green] {prometheus.url}  (alerts: {prometheus.url}/alerts)")
            with _grafana(Path(folder), prometheus, options.grafana_port) as url:
                if url is None:
                    console.print("Grafana is not installed; `dflash-serve top` shows the figures in a terminal")
                    console.print(f"  dflash-serve top --prometheus {prometheus.url}", markup=False)
                else:
                    console.print(f"[green]Grafana[/green]    {url}")
                while True:
                    time.sleep(60)
    except KeyboardInterrupt:
        return 0
    except PrometheusError as error:
        console.print(f"[red]cannot start:[/red] {error}")
        return 1


def provisioning(prometheus_url: str) -> dict[str, str]:
    """File name -> content of Grafana's provisioning folder."""
    sources = {
        "apiVersion": 1,
        "datasources": [
            {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus_url, "isDefault": True}
        ],
    }
    providers = {
        "apiVersion": 1,
        "providers": [{"name": "dflash-serve", "type": "file", "options": {"path": str(DASHBOARDS)}}],
    }
    return {
        "datasources/prometheus.yaml": yaml.safe_dump(sources, sort_keys=False),
        "dashboards/dflash.yaml": yaml.safe_dump(providers, sort_keys=False),
    }


@contextlib.contextmanager
def _grafana(folder: Path, prometheus: Prometheus, port: int) -> Iterator[str | None]:
    """Grafana with our dashboards, on loopback, open to whoever is on this machine; None where it is not installed."""
    program = shutil.which("grafana") or shutil.which("grafana-server")
    home = next((path for path in GRAFANA_HOMES if path.exists()), None)
    if program is None or home is None:
        yield None
        return
    for name, content in provisioning(prometheus.url).items():
        path = folder / "provisioning" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    environment = os.environ | {
        "GF_PATHS_DATA": str(folder / "grafana"),
        "GF_PATHS_LOGS": str(folder / "grafana"),
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
    }
    command = [program, *(["server"] if Path(program).name == "grafana" else []), f"--homepath={home}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield f"http://127.0.0.1:{port}/dashboards/f//?tag=dflash-serve"
    finally:
        process.terminate()
        process.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
