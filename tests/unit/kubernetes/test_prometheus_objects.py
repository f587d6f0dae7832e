"""Rules and dashboards reach the cluster as they are, whatever there is of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from dflash_serve.kubernetes import monitoring
from dflash_serve.kubernetes.__main__ import generated
from tests.unit.kubernetes.rendered import ROOT, one, render

MEBIBYTE = 1024 * 1024


def test_every_rule_and_dashboard_is_there() -> None:
    resources = render("monitoring")
    groups = [g for r in resources if r["kind"] == "PrometheusRule" for g in r["spec"]["groups"]]
    files = sorted((ROOT / "monitoring" / "rules").glob("*.yaml"))
    assert groups == [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    maps = {r["metadata"]["name"]: r for r in resources if r["kind"] == "ConfigMap"}
    paths = sorted((ROOT / "monitoring" / "dashboards").glob("*.json"))
    assert maps.keys() == {f"dflash-dashboard-{path.stem}" for path in paths}
    for path in paths:
        found = maps[f"dflash-dashboard-{path.stem}"]
        assert json.loads(found["data"][path.name]) == json.loads(path.read_text())
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert len(json.dumps(found)) < MEBIBYTE


def test_the_runbook_has_every_alert() -> None:
    rules = one(render("monitoring"), "PrometheusRule")["spec"]["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"] if "alert" in rule}
    table = (ROOT / "docs" / "kubernetes.md").read_text().split("\n## Alerts\n")[1]
    assert alerts
    assert set(re.findall(r"\bDFlash[A-Z]\w+", table)) == alerts


def test_rules_of_several_files_become_one_object() -> None:
    files: dict[str, dict[str, Any]] = {
        "b.yaml": {"groups": [{"name": "b", "rules": [{"alert": "DFlashDown", "expr": "up == 0", "for": "1m"}]}]},
        "a.yaml": {"groups": [{"name": "a", "rules": []}]},
    }
    assert [group["name"] for group in monitoring.prometheus_rule(files)["spec"]["groups"]] == ["a", "b"]


def test_new_sources_are_found(tmp_path: Path) -> None:
    (tmp_path / "serve_config.yaml").write_text((ROOT / "serve_config.yaml").read_text())
    for folder, name, text in (
        ("rules", "x.yaml", "groups: [{name: x, rules: []}]"),
        ("dashboards", "y.json", '{"uid": "y"}'),
    ):
        (tmp_path / "monitoring" / folder).mkdir(parents=True)
        (tmp_path / "monitoring" / folder / name).write_text(text)
    files = {path.name: text for path, text in generated(tmp_path).items()}
    assert yaml.safe_load(files["rules.generated.yaml"])["spec"]["groups"] == [{"name": "x", "rules": []}]
    (found,) = yaml.safe_load_all(files["dashboards.generated.yaml"])
    assert found["metadata"]["name"] == "dflash-dashboard-y"
    assert json.loads(found["data"]["y.json"]) == {"uid": "y"}
