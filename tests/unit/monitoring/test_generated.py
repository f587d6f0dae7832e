"""What is committed is what the generators make, and it says only what the catalogue knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from dflash_serve import metrics
from dflash_serve.monitoring.__main__ import ROOT, rendered
from dflash_serve.monitoring.rules import RuleParameters, alerts, duration, groups, read_parameters

FILES = rendered()
DASHBOARDS = {name: json.loads(text) for name, text in FILES.items() if name.endswith(".json")}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    asked = [target["expr"] for board in DASHBOARDS.values() for panel in panels(board) for target in panel["targets"]]
    for group_file in groups(RuleParameters()).values():
        asked += [rule["expr"] for group in group_file["groups"] for rule in group["rules"]]
    return asked


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_is_made(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name], "python -m dflash_serve.monitoring"


def test_nothing_else_lies_there() -> None:
    committed = {str(path.relative_to(ROOT)) for path in Path(ROOT, "monitoring").rglob("*") if path.is_file()}
    assert committed == {name for name in FILES if name.startswith("monitoring/")} | {"monitoring/settings.yaml"}


def test_every_metric_asked_for_is_in_the_catalogue() -> None:
    known = {m.exported_name for m in (*metrics.CATALOGUE, *metrics.RELIED_ON)}
    asked = {
        re.sub(r"_(bucket|count)$", "", name)
        for expression in expressions()
        for name in re.findall(r"\b(?:ray|autoscaler)_\w+", expression)
    }
    assert asked - known == set()
    # and what we say that we rely on, we do
    assert {m.exported_name for m in metrics.RELIED_ON} - asked == set()


def test_every_panel_has_title_description_unit_and_source() -> None:
    for board in DASHBOARDS.values():
        names = [panel["title"] for panel in panels(board)]
        assert names
        for panel in panels(board):
            assert panel["title"]
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
            for target in panel["targets"]:
                assert target["datasource"]["uid"] == "${datasource}"


def test_dashboards_have_the_agreed_frame() -> None:
    assert {board["uid"] for board in DASHBOARDS.values()} == {"dflash-fleet", "dflash-speculation", "dflash-replica"}
    for board in DASHBOARDS.values():
        assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "model", "replica"]
        assert board["tags"] == ["dflash-serve"]
        ids = [panel["id"] for panel in panels(board)]
        assert len(set(ids)) == len(ids)
        for panel in panels(board):
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_types_take_every_field(name: str) -> None:
    """Read into the SDK's types and written again, nothing is lost and nothing added."""
    register_default_plugins()
    board = Dashboard.from_json(json.loads(FILES[name]))
    assert JSONEncoder(sort_keys=True, indent=2).encode(board) + "\n" == FILES[name]


def test_rates_in_panels_follow_the_zoom() -> None:
    for board in DASHBOARDS.values():
        for panel in panels(board):
            for target in panel["targets"]:
                for window in re.findall(r"(?:rate|increase)\([^\[]*\[([^\]]+)\]", target["expr"]):
                    assert window == "$__rate_interval" or panel["type"] == "bargauge"


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    text = FILES["docs/alerts.md"]
    for alert in alerts(RuleParameters()):
        assert re.fullmatch(r"DFlash[A-Za-z]+", alert.name)
        assert alert.meaning
        assert alert.check
        assert alert.mend
        assert f"\n## {alert.name}\n" in text
        assert alert.rule("x")["annotations"]["runbook_url"] == f"x#{alert.name.lower()}"


def test_alerts_link_to_where_the_runbooks_are_said_to_be(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("runbooks: https://git.example.com/docs/alerts.md\nkv_cache_for_seconds: 60\n")
    parameters = read_parameters(settings)
    assert parameters == RuleParameters(runbooks="https://git.example.com/docs/alerts.md", kv_cache_for_seconds=60)
    rules = [rule for group in groups(parameters)["alerts.yaml"]["groups"] for rule in group["rules"]]
    assert all(
        rule["annotations"]["runbook_url"] == f"https://git.example.com/docs/alerts.md#{rule['alert'].lower()}"
        for rule in rules
    )
    settings.write_text("runbook: x\n")
    with pytest.raises(ValueError, match=r"no parameter runbook; there are .*runbooks"):
        read_parameters(settings)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (90, "90s"), (300, "5m"), (3600, "1h"), (86400, "1d")])
def test_durations_are_written_as_prometheus_does(seconds: int, text: str) -> None:
    assert duration(seconds) == text
