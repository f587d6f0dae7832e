"""The CPU demo overlay as processes: a worker killed and the head killed, under load."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import pods
from benchmarks.local_server import ROOT

pytestmark = pytest.mark.integration

RECOVERY_SECONDS = 60
WIDTH = 4


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if (why := pods.missing()) is not None:
        pytest.skip(f"pods cannot be made here: {why}")
    output = tmp_path_factory.mktemp("pods") / "result.json"
    command = [sys.executable, "-m", "benchmarks.pod_failures", "--steps", "worker,head", "--width", str(WIDTH)]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=480, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def incident(result: dict[str, Any], what: str) -> dict[str, Any]:
    (found,) = (each for each in result["incidents"] if each["what"] == what)
    return dict(found)


def test_a_killed_worker_costs_its_own_streams_alone(result: dict[str, Any]) -> None:
    killed = incident(result, "worker killed")
    assert killed["lost_outside"] == 0, killed
    assert killed["truncated"] == 0, killed
    assert killed["lost"] <= WIDTH, "more than were in flight"
    assert killed["first_answer_seconds"] < RECOVERY_SECONDS
    assert killed["last_failure_seconds"] < RECOVERY_SECONDS


def test_serving_goes_on_while_the_head_is_away(result: dict[str, Any]) -> None:
    killed = incident(result, "head killed")
    assert killed["lost"] == killed["rejected"] == killed["refused"] == killed["truncated"] == 0, killed
    assert killed["finished"] > 0
    assert killed["recovered_seconds"] < RECOVERY_SECONDS
    assert killed["words"] == [], "replicas outlive the head"


def test_no_kubelet_would_have_restarted_a_pod(result: dict[str, Any]) -> None:
    assert result["liveness_restarts"] == []


def test_the_operator_s_commands_come_from_the_manifest() -> None:
    from benchmarks.pod_failures import container_environment, ray_start, rendered

    cluster = rendered()["spec"]["rayClusterConfig"]
    head = ray_start(cluster["headGroupSpec"], head=True)
    assert head[:4] == ["ray", "start", "--head", "--block"]
    assert "--num-cpus=0" in head
    worker = ray_start(cluster["workerGroupSpecs"][0], head=False)
    assert {"--address=dflash-head-svc:6379", "--num-cpus=1"} <= set(worker)
    assert container_environment(cluster["headGroupSpec"])["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
