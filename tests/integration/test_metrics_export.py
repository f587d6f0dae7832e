"""What Prometheus sees through Ray's metrics agent."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.local_server import MODEL, Server, session_folder
from dflash_serve import metrics
from tests.integration.conftest import API_KEYS

pytestmark = pytest.mark.integration

EXPORT_SECONDS = 40


def scrape(server: Server) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Series name -> (labels, value), over all of the session's metrics endpoints."""
    targets = json.loads(Path(session_folder(server).parent, "prom_metrics_service_discovery.json").read_text())
    series: dict[str, list[tuple[dict[str, str], float]]] = {}
    for address in {address for group in targets for address in group["targets"]}:
        try:
            text = httpx.get(f"http://{address}/metrics", timeout=10).text
        except httpx.ConnectError:
            continue  # of a session that has ended
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series.setdefault(sample.name, []).append((sample.labels, sample.value))
    return series


def test_acceptance_and_load_reach_prometheus(server: Server) -> None:
    answer = server.client(API_KEYS[0]).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Count from 1 to 40."}], temperature=0, max_tokens=80
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    wanted = {
        metric.exported_name + ("_count" if metric.kind == "histogram" else "")
        for metric in metrics.CATALOGUE
        if metric is not metrics.TTFT  # streams only
    }
    deadline = time.monotonic() + EXPORT_SECONDS
    series = scrape(server)
    while not wanted <= series.keys() and time.monotonic() < deadline:
        time.sleep(1)
        series = scrape(server)
    assert wanted <= series.keys(), wanted - series.keys()

    def total(metric: metrics.Metric) -> float:
        return sum(value for labels, value in series[metric.exported_name] if labels.get("model") == MODEL)

    accepted, verifications = total(metrics.ACCEPTED_TOKENS), total(metrics.VERIFICATIONS)
    assert accepted >= (answer.usage.completion_tokens_details.accepted_prediction_tokens or 0) > 0
    assert 1 < 1 + accepted / verifications <= 6
    assert total(metrics.DRAFT_TOKENS) >= 5 * (verifications - 1)
    assert total(metrics.COMPLETION_TOKENS) >= answer.usage.completion_tokens
    for labels, value in series[metrics.ACCEPTANCE_LENGTH.exported_name]:
        assert labels["model"] == MODEL
        assert labels["replica"]
        assert 1 <= value <= 6
    assert all(not any(key in str(labels) for key in API_KEYS) for many in series.values() for labels, _ in many)
