"""The manifests as `kubectl apply -k` would send them."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.unit.kubernetes.crd_schema import StrictLoader

ROOT = Path(__file__).parents[3]
OVERLAYS = ("b300", "cpu-demo", "h200")
KUBECTL = Path(sys.executable).with_name("kubectl")
Resource = dict[str, Any]


@cache
def render(folder: str) -> list[Resource]:
    """All resources of a folder below k8s/."""
    return render_path(ROOT / "k8s" / folder)


def render_path(folder: Path) -> list[Resource]:
    """All resources of a folder."""
    result = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [resource for resource in yaml.load_all(result.stdout, StrictLoader) if resource]


def overlay(name: str) -> list[Resource]:
    return render(f"overlays/{name}")


def one(resources: list[Resource], kind: str, name: str | None = None) -> Resource:
    """The only resource of the kind, or of kind and name."""
    (found,) = (r for r in resources if r["kind"] == kind and name in (None, r["metadata"]["name"]))
    return found


def serve_config(service: Resource) -> Resource:
    config = yaml.load(service["spec"]["serveConfigV2"], StrictLoader)
    assert isinstance(config, dict)
    return config


def head(service: Resource) -> Resource:
    group: Resource = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return group


def workers(service: Resource) -> Resource:
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert isinstance(group, dict)
    return group


def pod(group: Resource) -> Resource:
    spec: Resource = group["template"]["spec"]
    return spec


def container(group: Resource) -> Resource:
    """Ray's container: the operator takes the first."""
    first: Resource = pod(group)["containers"][0]
    return first


def environment(group: Resource) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container(group)["env"]}
