"""The configuration of our own Prometheus, and a real one that reads it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from dflash_serve.monitoring.local import provisioning
from dflash_serve.monitoring.preview import concrete, text
from dflash_serve.monitoring.prometheus import PrometheusError, configuration, program, running
from dflash_serve.monitoring.rules import RuleParameters


@pytest.mark.prometheus
def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    discovery = tmp_path / "discovery.json"
    discovery.write_text("[]")
    for name, content in configuration([discovery], RuleParameters()).items():
        (tmp_path / name).write_text(content)
    command = [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.prometheus
def test_a_prometheus_of_our_own_answers_and_says_what_is_wrong(tmp_path: Path) -> None:
    with running(tmp_path, [tmp_path / "none.json"]) as prometheus:
        (sample,) = prometheus.query("vector(2)")
        assert sample.value == 2
        assert prometheus.query("absent_metric") == []
        assert [s.points[-1][1] for s in prometheus.query_range("vector(1)", 0, 10, 5)] == [1.0]
        with pytest.raises(PrometheusError, match=r"refuses the query: .*parse error"):
            prometheus.query("sum(")
    with pytest.raises(PrometheusError, match="no Prometheus at"):
        prometheus.query("vector(1)")


def test_grafana_gets_the_committed_dashboards() -> None:
    files = {name: yaml.safe_load(content) for name, content in provisioning("http://127.0.0.1:9090").items()}
    folder = Path(files["dashboards/dflash.yaml"]["providers"][0]["options"]["path"])
    assert sorted(path.name for path in folder.glob("*.json")) == ["fleet.json", "replica.json", "speculation.json"]
    assert files["datasources/prometheus.yaml"]["datasources"][0]["url"] == "http://127.0.0.1:9090"


def test_grafanas_variables_are_filled_in() -> None:
    assert concrete('rate(x{model=~"$model", replica=~"$replica"}[$__rate_interval])') == (
        'rate(x{model=~".*", replica=~".*"}[1m])'
    )


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(0.034, "s", "34 ms"), (2.5, "s", "2.5 s"), (0.024, "percentunit", "2.4%"), (2**30, "bytes", "1.0 GiB")],
)
def test_values_are_written_with_their_unit(value: float, unit: str, expected: str) -> None:
    assert text(value, unit) == expected
