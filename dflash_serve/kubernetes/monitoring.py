"""Rule files and dashboards -> the objects that prometheus-operator and Grafana's sidecar read. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

FOLDER = "dflash-serve"
"""Grafana's folder."""
LABELS = {"app.kubernetes.io/name": "dflash"}


def prometheus_rule(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A PrometheusRule with the groups of all rule files.

    Args:
        files: Content by file name.
    """
    groups = [group for name in sorted(files) for group in files[name]["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "dflash", "labels": LABELS},
        "spec": {"groups": groups},
    }


def dashboard_config_map(name: str, dashboard: Mapping[str, Any]) -> dict[str, Any]:
    """A ConfigMap that Grafana's dashboard sidecar finds by its label."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": f"dflash-dashboard-{name}",
            "labels": LABELS | {"grafana_dashboard": "1"},
            "annotations": {"grafana_folder": FOLDER},
        },
        # compact: a ConfigMap holds 1 MiB
        "data": {f"{name}.json": json.dumps(dashboard, separators=(",", ":"), ensure_ascii=False)},
    }


def dashboard_config_maps(dashboards: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """One a dashboard, by file name without its ending."""
    return [dashboard_config_map(name, dashboards[name]) for name in sorted(dashboards)]
