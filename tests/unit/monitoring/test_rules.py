"""Each alert, by promtool: made series that cross its threshold fire it, series that stay below do not."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from dflash_serve.monitoring.prometheus import program
from dflash_serve.monitoring.rules import RuleParameters, alerts, groups, render

LABELS = 'model="m", replica="r1"'
DEPLOYMENT = 'application="dflash", deployment="DFlashServer:m"'

WANTED = f"ray_serve_autoscaling_target_replicas{{{DEPLOYMENT}}}"
HEALTHY = f'ray_serve_deployment_replica_healthy{{{DEPLOYMENT}, replica="r1"}}'
SECOND_HEALTHY = HEALTHY.replace("r1", "r2")
RUNNING = f"ray_dflash_running_requests{{{LABELS}}}"
WAITING = f"ray_dflash_waiting_requests{{{LABELS}}}"
KV = f"ray_dflash_kv_cache_usage_ratio{{{LABELS}}}"
STARTED = f"ray_dflash_start_seconds{{{LABELS}}}"
VERIFICATIONS = f"ray_dflash_verifications_total{{{LABELS}}}"
ACCEPTED = f"ray_dflash_accepted_tokens_total{{{LABELS}}}"
DRAFTED = f"ray_dflash_draft_tokens_total{{{LABELS}}}"
UNPROFITABLE = f"ray_dflash_drafter_unprofitable{{{LABELS}}}"
AUTOREGRESSIVE = f"ray_dflash_autoregressive_seconds_total{{{LABELS}}}"


def replica(name: str) -> str:
    return RUNNING.replace("r1", name)


def requests(outcome: str) -> str:
    return f'ray_dflash_requests_total{{{LABELS}, traffic_class="other", outcome="{outcome}"}}'


HEALTHY_FLEET = {
    WANTED: "1x300",
    HEALTHY: "1x300",
    RUNNING: "4x300",
    WAITING: "0x300",
    KV: "0.3x300",
    STARTED: "120x300",
    # a minute a sample: 10 verifications/s, 15 accepted of 70 draft tokens/s
    VERIFICATIONS: "0+600x300",
    DRAFTED: "0+4200x300",
    ACCEPTED: "0+900x300",
    UNPROFITABLE: "0x300",
    requests("ok"): "0+100x300",
}
"""Series of five hours, one sample a minute, in promtool's notation (`start+step x count`)."""


@dataclass
class Case:
    alert: str
    what: str
    fires: bool
    changes: Mapping[str, str | None] = field(default_factory=dict)
    """Series laid over the healthy fleet's; None takes one out."""
    at: str = "30m"

    @property
    def name(self) -> str:
        return f"{self.alert}: {self.what}"


CASES = [
    Case("DFlashNoMetrics", "nothing is scraped", True, dict.fromkeys(HEALTHY_FLEET)),
    Case("DFlashNoMetrics", "Serve wants a replica and none publishes", True, {RUNNING: None}),
    Case("DFlashNoMetrics", "metrics were late for four minutes", False, {RUNNING: "4x55 _x4 4x200"}, at="1h1m"),
    Case("DFlashNoMetrics", "scaled to zero", False, {RUNNING: None, WANTED: "0x300", HEALTHY: None}),
    Case("DFlashErrorRate", "three in a hundred fail", True, {requests("error"): "0+3x300"}),
    Case("DFlashErrorRate", "one in a hundred fails", False, {requests("error"): "0+1x300"}),
    Case("DFlashErrorRate", "many are refused and leave", False, {requests("rejected"): "0+50x300"}),
    Case("DFlashScalingStuck", "two wanted, one there", True, {WANTED: "2x300"}),
    Case("DFlashScalingStuck", "one wanted, none ever came", True, {HEALTHY: None, RUNNING: None}),
    Case("DFlashScalingStuck", "the second takes ten minutes", False, {WANTED: "1x49 2x9 1x200"}, at="1h"),
    Case(
        "DFlashReplicaFlapping",
        "five replicas in an hour, one at a time",
        True,
        {RUNNING: "4x10"} | {replica(f"x{i}"): f"_x{i * 10} 1x9" for i in (1, 2, 3, 4, 5)},
        at="1h",
    ),
    Case(
        "DFlashReplicaFlapping",
        "scaled up to five and down again",
        False,
        {replica(f"x{i}"): "_x20 1x20" for i in range(4)},
        at="1h",
    ),
    Case("DFlashAcceptanceCollapsed", "a tenth of a token accepted", True, {ACCEPTED: "0+60x300"}),
    Case("DFlashAcceptanceCollapsed", "nothing accepted: the series never appears", True, {ACCEPTED: None}),
    Case("DFlashAcceptanceCollapsed", "just above the floor", False, {ACCEPTED: "0+150x300"}),
    Case(
        "DFlashAcceptanceCollapsed",
        "collapsed for eight minutes",
        False,
        {ACCEPTED: "0+900x50 45060+60x8 45540+900x200"},
        at="1h2m",
    ),
    Case("DFlashAcceptanceCollapsed", "bad, and hardly a request", False, {ACCEPTED: None, VERIFICATIONS: "0+6x300"}),
    Case("DFlashAcceptanceCollapsed", "idle", False, {ACCEPTED: "900x300", VERIFICATIONS: "600x300"}),
    Case("DFlashAcceptanceDropped", "from 2.5 to 1.4", True, {ACCEPTED: "0+900x240 216240+240x60"}, at="4h30m"),
    Case("DFlashAcceptanceDropped", "from 2.5 to 2.1", False, {ACCEPTED: "0+900x240 216660+660x60"}, at="4h30m"),
    Case("DFlashDrafterUnprofitable", "the best choice is not to draft", True, {UNPROFITABLE: "1x300"}),
    Case("DFlashDrafterUnprofitable", "for ten minutes", False, {UNPROFITABLE: "0x49 1x10 0x200"}, at="1h"),
    Case("DFlashSpeculationOff", "nearly all time without drafting", True, {AUTOREGRESSIVE: "0+50x300"}, at="1h"),
    Case("DFlashSpeculationOff", "a third of the time", False, {AUTOREGRESSIVE: "0+20x300"}, at="1h"),
    Case("DFlashReplicaSilent", "two healthy, one publishes", True, {SECOND_HEALTHY: "1x300"}),
    Case("DFlashReplicaSilent", "both publish", False, {SECOND_HEALTHY: "1x300", replica("r2"): "0x300"}),
    Case("DFlashQueueGrowing", "twenty wait", True, {WAITING: "20x300"}),
    Case("DFlashQueueGrowing", "a burst of three minutes", False, {WAITING: "0x56 20x3 0x200"}, at="1h"),
    Case("DFlashKvCacheFull", "full", True, {KV: "0.99x300"}),
    Case("DFlashKvCacheFull", "well used", False, {KV: "0.9x300"}),
    Case("DFlashRequestsShed", "one in ten", True, {requests("shed"): "0+11x300"}),
    Case("DFlashRequestsShed", "one in fifty", False, {requests("shed"): "0+2x300"}),
    Case("DFlashSlowColdStart", "twenty minutes, just now", True, {STARTED: "_x30 1200x200"}, at="1h"),
    Case("DFlashSlowColdStart", "twenty minutes, hours ago", False, {STARTED: "1200x300"}, at="3h"),
    Case("DFlashSlowColdStart", "two minutes", False, {STARTED: "_x30 120x200"}, at="1h"),
]


def promtool_test(case: Case) -> dict[str, Any]:
    series = {name: values for name, values in {**HEALTHY_FLEET, **case.changes}.items() if values is not None}
    firing = f'count(ALERTS{{alertname="{case.alert}", alertstate="firing"}}) or vector(0)'
    return {
        "name": case.name,
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": case.at,
                "exp_samples": [{"labels": "{}", "value": 1.0 if case.fires else 0.0}],
            }
        ],
    }


def promtool(folder: Path, tests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    files = groups(RuleParameters())
    for name, content in files.items():
        (folder / name).write_text(render(content))
    (folder / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": list(files), "evaluation_interval": "1m", "tests": tests}, sort_keys=False)
    )
    command = [program("promtool"), "test", "rules", str(folder / "tests.yaml")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.prometheus
def test_alerts_fire_above_their_thresholds_and_not_below(tmp_path: Path) -> None:
    result = promtool(tmp_path, [promtool_test(case) for case in CASES])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.prometheus
def test_a_wrong_expectation_is_noticed(tmp_path: Path) -> None:
    """That the test above can fail."""
    wrong = Case("DFlashKvCacheFull", "full", False, {KV: "0.99x300"})
    assert promtool(tmp_path, [promtool_test(wrong)]).returncode != 0


@pytest.mark.parametrize("fires", [True, False])
def test_every_alert_has_a_case_of_either_kind(fires: bool) -> None:
    assert {alert.name for alert in alerts(RuleParameters())} == {case.alert for case in CASES if case.fires is fires}


@pytest.mark.prometheus
def test_a_healthy_fleet_fires_nothing_and_recordings_say_what_is_so(tmp_path: Path) -> None:
    expected = {
        'model:dflash_acceptance_length:rate{model="m"}': 2.5,
        'model:dflash_draft_acceptance_ratio:rate{model="m"}': 15 / 70,
        'model:dflash_rejected_tokens:rate{model="m"}': 55,
        'model:dflash_error_ratio:rate{model="m"}': 0,
        'model:dflash_replicas:count{model="m"}': 1,
        'count(ALERTS{alertstate=~"firing|pending"}) or vector(0)': 0,
    }
    checks: list[dict[str, Any]] = [
        {
            "expr": f"round({expression}, 0.0001)",
            "eval_time": "2h",
            "exp_samples": [{"labels": '{model="m"}', "value": round(value, 4)}],
        }
        for expression, value in expected.items()
    ]
    checks[-1]["exp_samples"] = [{"labels": "{}", "value": 0}]
    test = promtool_test(Case("DFlashKvCacheFull", "healthy", False)) | {"promql_expr_test": checks}
    result = promtool(tmp_path, [test])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.prometheus
def test_texts_name_the_model_and_the_figure(tmp_path: Path) -> None:
    test = promtool_test(Case("DFlashAcceptanceCollapsed", "texts", True, {ACCEPTED: "0+60x300"}))
    test["alert_rule_test"] = [
        {
            "eval_time": "1h",
            "alertname": "DFlashAcceptanceCollapsed",
            "exp_alerts": [
                {
                    "exp_labels": {"severity": "warning", "model": "m"},
                    "exp_annotations": {
                        "summary": "The drafter of m hardly guesses a token.",
                        "description": "m makes 1.1 tokens per verification, the bonus token included: drafting costs "
                        "more than it gives.",
                        "runbook_url": "docs/alerts.md#dflashacceptancecollapsed",
                    },
                }
            ],
        }
    ]
    result = promtool(tmp_path, [test])
    assert result.returncode == 0, result.stdout + result.stderr
