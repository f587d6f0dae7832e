"""The CPU demo overlay as processes, and its head killed under load.

A killed worker, a drained one and a rolling update take minutes more: `python -m benchmarks.pod_failures`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import pod_failures, pods
from benchmarks.local_server import ROOT

pytestmark = pytest.mark.integration

RECOVERY_SECONDS = 60
WIDTH = 2


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if (why := pods.missing()) is not None:
        pytest.skip(f"pods cannot be made here: {why}")
    output = tmp_path_factory.mktemp("pods") / "result.json"
    command = [sys.executable, "-m", "benchmarks.pod_failures", "--steps", "head", "--width", str(WIDTH)]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=480, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_serving_goes_on_while_the_head_is_away(
    result: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    (killed,) = result["incidents"]
    record_property("head killed: streams that ended meanwhile", killed["finished"])
    record_property("head killed: all as before after, seconds", killed["recovered_seconds"])
    assert not [words for words in killed["words"] if "replaced" in words], "replicas outlive the head"
    assert killed["rejected"] == killed["lost"] == killed["refused"] == killed["truncated"] == 0, killed
    assert killed["finished"] > 0
    assert pod_failures.HEAD_AWAY_SECONDS < killed["recovered_seconds"] < RECOVERY_SECONDS


def test_one_pod_was_replaced_and_no_kubelet_would_have_restarted_another(result: dict[str, Any]) -> None:
    assert result["pods_replaced"] == ["head-1"]
    assert result["liveness_restarts"] == []
