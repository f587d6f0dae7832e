"""`dflash-serve up`: a Ray session on this machine with the settings that serving needs, then the application.

The same application as `serve run serve_config.yaml`; what this adds is the environment that Ray reads when it starts
(HAProxy direct streaming), the bundled model pair's progress bar, and plain words about what happens.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from dflash_serve import demo, haproxy
from dflash_serve.monitoring import latest_session
from dflash_serve.settings import SettingsError

if TYPE_CHECKING:
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

BUILDER = "deployments.app:build"

HIGH_THROUGHPUT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    **haproxy.variables(),
}
SESSION = {
    # a fresh Ray session has token authentication on; saying so makes `serve status` in the same shell settings work
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray's workers have niceness 15, replicas and their engines among them: whatever else runs on the machine, the
    # client too, would go before them
    "RAY_worker_niceness": "0",
    # a line a request must be there when one looks, not a thousand requests later
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # one machine has no load balancer that needs time to notice
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}
POLL_SECONDS = 0.5
REPLICA_PORTS = (30000, 31000)
REPLICA_PORT_BLOCK = 50
LONGEST_HAPROXY_BASE = 97 - len(f"/dflash-{'x' * 8}/{'f' * 56}/admin.sock")
"""Characters of the folder that holds HAProxy's; `f` stands for a Ray node's id."""
STATS_PORT, METRICS_PORT = 8404, 9101
"""HAProxy's, where no other session of the machine has them."""

console = Console(stderr=True, highlight=False)
_claims: list[socket.socket] = []


def run(config_path: Path, *, address: str | None, plain: bool) -> int:
    """Deploy and stay until interrupted. Returns the exit status: 1 when the application cannot be deployed."""
    started = time.monotonic()
    _set_environment(plain=plain)
    try:
        config = load_config(config_path)
    except (OSError, ValueError) as error:
        console.print(f"[red]{config_path}:[/red] {escape(str(error))}")
        return 1

    import ray
    from ray import serve
    from ray.exceptions import RayError

    from deployments._upstream import serve_start

    try:
        with console.status("starting Ray"):
            _init_ray(address)
            _stop_on_signals()
            client = serve_start(config)
        if address is None:
            _make_bundled_models(config)
        client.deploy_apps(config, _blocking=False)
        if not _wait_until_running(config, started):
            return 1
        _announce(config, time.monotonic() - started)
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        console.print("stopping: requests in flight may finish first")
        return 0
    except (RayError, demo.DemoError, SettingsError) as error:
        console.print(f"[red]cannot start:[/red] {escape(last_words(str(error)))}")
        return 1
    finally:
        if address is None and ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
            _stop_haproxy()


def load_config(path: Path) -> ServeDeploySchema:
    """Read and check a Serve configuration file, each application's `args` included.

    Raises OSError when it cannot be read and ValueError, with every problem in its text, when it is wrong.
    """
    from ray.serve.schema import ServeDeploySchema

    from deployments.app import check

    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(problems) from None
    for application in our_applications(config):
        check(application.args, http_host=config.http_options.host)
    return config


def our_applications(config: ServeDeploySchema) -> list[ServeApplicationSchema]:
    """Those that our builder makes."""
    return [a for a in config.applications if a.import_path == BUILDER]


def _make_bundled_models(config: ServeDeploySchema) -> None:
    """Here, with a progress bar, rather than in a replica where nobody sees it."""
    from deployments.app import check, cluster_now

    for application in our_applications(config):
        settings = check(application.args, http_host=config.http_options.host, cluster=cluster_now()).settings
        demo.resolve(settings.target)


def _set_environment(*, plain: bool) -> None:
    """Must run before anything imports ray: it reads these once."""
    if "ray" in sys.modules:
        raise RuntimeError("deployments.up must set Ray's environment before ray is imported")
    for name, value in (SESSION if plain else SESSION | HIGH_THROUGHPUT).items():
        os.environ.setdefault(name, value)
    if not plain:
        # two sessions of one machine must not share HAProxy's files
        folder = _haproxy_folder()
        os.environ.setdefault("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", str(folder / "haproxy.cfg"))
        os.environ.setdefault("RAY_SERVE_HAPROXY_SOCKET_PATH", str(folder / "admin.sock"))
        os.environ.setdefault("RAY_SERVE_HAPROXY_SERVER_STATE_BASE", str(folder))
        os.environ.setdefault("RAY_SERVE_HAPROXY_SERVER_STATE_FILE", str(folder / "server-state"))
        for name, port in _ports_of_our_own().items():
            os.environ.setdefault(name, str(port))


def _haproxy_folder() -> Path:
    """A new folder, removed at exit. Its path is short: Serve adds the node's id, and HAProxy takes 97 characters."""
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="dflash-", dir=base if len(base) <= LONGEST_HAPROXY_BASE else "/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _stop_haproxy() -> None:
    """One that was just replaced while Serve stopped outlives it."""
    socket_path = os.environ.get("RAY_SERVE_HAPROXY_SOCKET_PATH")
    if socket_path is None:
        return
    folder = f"{Path(socket_path).parent}/".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(argument.startswith(folder) for argument in (process / "cmdline").read_bytes().split(b"\0")):
                os.kill(int(process.name), signal.SIGTERM)


def _ports_of_our_own() -> dict[str, int]:
    """Ports, by Ray's environment variables, that no other session of this machine listens on or is about to.

    Ray gives every session the same, and its replicas and fallback proxies share them silently (SO_REUSEPORT): two
    sessions would answer each other's requests. HAProxy does not share, and the second session's would end.
    """
    blocks = range(*REPLICA_PORTS, REPLICA_PORT_BLOCK)
    free = (first for first in blocks if all(_free_port(p) for p in range(first, first + REPLICA_PORT_BLOCK)))
    # a block is claimed by its first port
    first = next(filter(_claim, free), REPLICA_PORTS[0])
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": first,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": first + REPLICA_PORT_BLOCK - 1,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": _own_port(),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": _own_port(),
        "RAY_SERVE_HAPROXY_STATS_PORT": _own_port(STATS_PORT),
        "RAY_SERVE_HAPROXY_METRICS_PORT": _own_port(METRICS_PORT),
    }


def _own_port(wanted: int = 0) -> int:
    """`wanted` when it is free and claimed by no other session, else any such port."""
    if wanted and _free_port(wanted) and _claim(wanted):
        return wanted
    while not _claim(port := _free_port()):
        pass
    return port


def _claim(port: int) -> bool:
    """Whether the port is this session's from now until its process ends, by which it is bound or not needed.

    A claim is a socket's name in Linux's abstract space: no file, one space for all who share the ports (users,
    containers on the host's network), and the kernel takes it back.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0dflash-serve-port-{port}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True


def _free_port(port: int = 0) -> int:
    """`port` when nothing listens on it, else 0; any free one for 0."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return 0
        found: int = probe.getsockname()[1]
        return found


def _init_ray(address: str | None) -> None:
    import ray

    # On loopback alone: replica ports and HAProxy's own pages have no authentication of their own.
    options: dict[str, Any] = {"address": address} if address else {"_node_ip_address": "127.0.0.1"}
    ray.init(namespace="serve", log_to_driver=False, logging_level=logging.WARNING, **options)


def _wait_until_running(config: ServeDeploySchema, started: float) -> bool:
    """Show what is being waited for; False when an application failed, after saying why."""
    from ray import serve

    with console.status("deploying") as status:
        while True:
            applications = serve.status().applications
            states = [applications[a.name] for a in config.applications if a.name in applications]
            for name, application in applications.items():
                if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    console.print(f"[red]application {name} failed[/red]")
                    console.print(last_words(application.message or _deployment_messages(application)), markup=False)
                    return False
            if len(states) == len(config.applications) and all(a.status == "RUNNING" for a in states):
                return True
            waited = time.monotonic() - started
            status.update(f"loading the model ({waited:.0f} s; logs in {latest_session()}/logs/serve)")
            time.sleep(POLL_SECONDS)


def _deployment_messages(application: Any) -> str:
    return "\n".join(d.message for d in application.deployments.values() if d.message)


def last_words(message: str) -> str:
    """The cause out of a message that may hold a traceback: what follows the last `SomeError: `."""
    causes = re.findall(
        r"^(?:[\w.]+\.)?\w*(?:Error|Exception): (.+(?:\n(?![ \t]|Traceback).+)*)", message, re.MULTILINE
    )
    return str(causes[-1]).strip() if causes else message.strip()


def _announce(config: ServeDeploySchema, seconds: float) -> None:
    host = config.http_options.host
    url = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0', None) else host}:{config.http_options.port}/v1"
    console.print(f"[green]ready[/green] in {seconds:.0f} s: {url}  (Ctrl-C stops)")
    console.print(f"  curl {url}/models", markup=False)


def _stop_on_signals() -> None:
    """After Ray has started: it takes SIGTERM for a crash. A shell's background job would have SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
