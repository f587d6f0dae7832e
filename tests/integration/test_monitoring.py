"""What an operator sees: a real Prometheus that scrapes two real servers under load, one with a drafter made bad."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks.collector import Collector
from benchmarks.local_server import BIN, MODEL, ROOT, Server, metrics_discovery, replica_logs, serving
from dflash_serve import metrics
from dflash_serve.metrics import Metric
from dflash_serve.monitoring.preview import concrete
from dflash_serve.monitoring.prometheus import Prometheus, running
from dflash_serve.monitoring.rules import ACCEPTANCE, VERIFICATIONS, RuleParameters
from tests.integration.bad_drafter import shuffled_drafter
from tests.integration.conftest import API_KEYS, MAX_REQUESTS, TRAFFIC_CLASSES

pytestmark = [pytest.mark.integration, pytest.mark.prometheus]

BAD_MODEL = "bad-drafter"
EXPECTED_ALERT = f"DFlashAcceptanceCollapsed {BAD_MODEL}"
BAD_WINDOW_SECONDS = 10
DRAFT_TOKENS = 5
"""The most of the bundled pair."""
RULES = RuleParameters(rate_window_seconds=30, evaluation_interval_seconds=2, acceptance_for_seconds=20)
"""The rules as they are, in a hurry: Ray's metrics move every 10 s, so a rate needs half a minute."""
ALERT_SECONDS = 10 + 2 * RULES.rate_window_seconds + RULES.acceptance_for_seconds
"""Ray's export, two rate windows at most, the alert's own time."""
MORE_SECONDS = 15
"""The load goes on for so long after the alert, lest the healthy model only be slower to fire it."""
SECRETS = ("canary-prompt", "canary-user", *API_KEYS)
NEVER = {metrics.VLLM_PREEMPTIONS, metrics.AUTOREGRESSIVE_SECONDS}
"""Counters that may have nothing to count here, and Ray exports no zero: nothing is preempted, all steps draft."""
TRACE = "0af7651916cd43dd8448eb211c80319c"
MAX_TOKENS = 32
QUESTION = "Take your time, and leave no number out. " * 30 + f"Count from 1 to 40. {SECRETS[0]}"
"""Longer than two blocks of the KV cache (128 tokens on CPU), so that the prefix cache has something to find: with a
drafter, vLLM computes the last block that it finds anew."""


@dataclass
class Observed:
    prometheus: Prometheus
    server: Server
    bad: Server
    start: float
    end: float
    """When the load ended: Unix seconds."""
    fired_seconds: dict[str, float]
    """Firing alerts by `name model`, and how long after the load began they fired."""


async def keep_busy(server: Server, model: str, key: str, enough: asyncio.Event, *, worker: int) -> None:
    """Greedy requests one after the other, as streams of either class or whole."""
    async with server.async_client(key) as client:
        turn = worker
        while not enough.is_set():
            turn += 1
            options: Any = {
                "model": model,
                "messages": [{"role": "user", "content": QUESTION}],
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "user": SECRETS[1],
                "extra_headers": {"x-dflash-traffic-class": [*TRAFFIC_CLASSES, SECRETS[1]][turn % 3]},
            }
            try:
                if turn % 4:
                    async for _ in await client.chat.completions.create(stream=True, **options):
                        pass
                else:
                    await client.chat.completions.create(**options)
            except openai.RateLimitError:
                # the burst of `more_than_it_takes` filled the replica
                await asyncio.sleep(0.5)


async def more_than_it_takes(server: Server) -> None:
    """A burst over the limit, and a request that is refused."""
    async with server.async_client(API_KEYS[0]) as client:
        ask = client.chat.completions.create
        # what the load asks: a burst of other requests would for a while be most of what acceptance is taken from
        options: Any = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": MAX_TOKENS}
        burst = [ask(model=MODEL, **options) for _ in range(MAX_REQUESTS + 4)]
        results = await asyncio.gather(*burst, return_exceptions=True)
        assert any(isinstance(result, openai.RateLimitError) for result in results)
        with suppress(openai.BadRequestError):
            await ask(model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=100_000)


async def watch_alerts(prometheus: Prometheus, enough: asyncio.Event) -> dict[str, float]:
    """Until the bad drafter's alert and a while more, or until it is late."""
    started = time.time()
    until = started + ALERT_SECONDS
    fired: dict[str, float] = {}
    while time.time() < until:
        for alert in await asyncio.to_thread(prometheus.alerts):
            name = f"{alert['labels']['alertname']} {alert['labels'].get('model', '')}".strip()
            if alert["state"] == "firing" and name not in fired:
                fired[name] = time.time() - started
                if name == EXPECTED_ALERT:
                    until = time.time() + MORE_SECONDS
        await asyncio.sleep(1)
    enough.set()
    return fired


@pytest.fixture(scope="module")
def observed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Both servers under the same load for a while, watched."""
    args = {
        "model_id": BAD_MODEL,
        "drafter": str(shuffled_drafter(tmp_path_factory.mktemp("drafter"))),
        "metrics": {"acceptance_window_seconds": BAD_WINDOW_SECONDS},
        # an adaptive one soon stops drafting, and verifies too little for this alert
        "speculation": {"mode": "fixed"},
    }
    with serving(tmp_path_factory.mktemp("bad"), args) as bad:
        discovery = [metrics_discovery(server), metrics_discovery(bad)]
        folder = tmp_path_factory.mktemp("prometheus")
        with running(folder, discovery, parameters=RULES, scrape_seconds=5) as prometheus:

            async def run() -> dict[str, float]:
                enough = asyncio.Event()
                watching = asyncio.create_task(watch_alerts(prometheus, enough))
                await asyncio.gather(
                    *(keep_busy(server, MODEL, API_KEYS[0], enough, worker=i) for i in range(2)),
                    *(keep_busy(bad, BAD_MODEL, "none", enough, worker=i) for i in range(2)),
                    more_than_it_takes(server),
                )
                return await watching

            start = time.time()
            fired = asyncio.run(run())
            yield Observed(prometheus, server, bad, start, time.time(), fired)


def value(prometheus: Prometheus, expression: str) -> float:
    (sample,) = prometheus.query(expression)
    return sample.value


def test_a_bad_drafter_fires_the_acceptance_alert_and_a_good_one_does_not(
    observed: Observed, record_property: Callable[[str, object], None]
) -> None:
    for fired, seconds in observed.fired_seconds.items():
        record_property(f"{fired} fired after the load began, seconds", round(seconds))
    assert set(observed.fired_seconds) == {EXPECTED_ALERT}
    # as the alert has it: of a handful of verifications, as when the load begins, acceptance is chance
    busy = f"({ACCEPTANCE} and {VERIFICATIONS} > {RULES.min_verifications_per_second})[1m:2s]"
    longest = {s.labels["model"]: s.value for s in observed.prometheus.query(f"max_over_time({busy})")}
    shortest = {s.labels["model"]: s.value for s in observed.prometheus.query(f"min_over_time({busy})")}
    bad, good = longest[BAD_MODEL], shortest[MODEL]
    print(f"acceptance length: {bad:.2f} at most, {good:.2f} at least")
    assert bad < RULES.acceptance_floor < 1.5 < good
    (alert,) = [a for a in observed.prometheus.alerts() if a["labels"]["alertname"] == EXPECTED_ALERT.split()[0]]
    assert alert["annotations"]["summary"] == f"The drafter of {BAD_MODEL} hardly guesses a token."


@pytest.mark.parametrize("name", ["fleet", "speculation", "replica"])
def test_no_panel_is_empty(observed: Observed, name: str) -> None:
    board = json.loads((ROOT / "monitoring" / "dashboards" / f"{name}.json").read_text())
    empty, drawn = [], 0
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            series = observed.prometheus.query_range(concrete(target["expr"]), observed.start, observed.end, 5)
            if any(not math.isnan(point) for one in series for _, point in one.points):
                drawn += 1
            else:
                empty.append(f"{panel['title']}: {target['expr']}")
    assert empty == []
    assert drawn >= 15


def test_recording_rules_have_values(observed: Observed) -> None:
    for name in (ACCEPTANCE, "model:dflash_output_tokens:rate", "model_position:dflash_acceptance_ratio:rate"):
        assert {sample.labels["model"] for sample in observed.prometheus.query(name)} == {MODEL, BAD_MODEL}


def test_every_metric_is_exported_with_its_labels(observed: Observed) -> None:
    for metric in set(metrics.CATALOGUE) - NEVER:
        samples = observed.prometheus.query(f'last_over_time({metric.series_name}{{model="{MODEL}"}}[5m])')
        assert samples, metric.name
        assert set(metric.labels) <= samples[0].labels.keys(), metric.name
    for metric in set(metrics.RELIED_ON) - NEVER:
        assert observed.prometheus.query(f"last_over_time({metric.series_name}[5m])"), metric.name


def test_the_counters_agree(observed: Observed) -> None:
    def total(metric: Metric) -> float:
        return value(observed.prometheus, f'sum(last_over_time({metric.exported_name}{{model="{MODEL}"}}[5m]))')

    verifications, drafted, accepted = map(
        total, (metrics.VERIFICATIONS, metrics.DRAFT_TOKENS, metrics.ACCEPTED_TOKENS)
    )
    assert 0 < accepted < drafted <= DRAFT_TOKENS * verifications
    assert total(metrics.POSITION_DRAFT_TOKENS) == drafted
    assert total(metrics.POSITION_ACCEPTED_TOKENS) == accepted
    outcomes = {
        sample.labels["outcome"]: sample.value
        for sample in observed.prometheus.query(
            f'sum by (outcome) (last_over_time({metrics.REQUESTS.exported_name}{{model="{MODEL}"}}[5m]))'
        )
    }
    assert outcomes["ok"] > 10
    assert outcomes["shed"] >= 4
    assert outcomes["rejected"] >= 1
    positions = {
        sample.labels["position"]
        for sample in observed.prometheus.query(f'{metrics.POSITION_DRAFT_TOKENS.exported_name}{{model="{MODEL}"}}')
    }
    assert metrics.position_label(0) in positions
    assert positions <= {metrics.position_label(index) for index in range(DRAFT_TOKENS)}


def test_labels_are_bounded_and_metrics_carry_no_text_key_or_user(observed: Observed) -> None:
    classes = {
        sample.labels["traffic_class"] for sample in observed.prometheus.query(metrics.COMPLETION_TOKENS.exported_name)
    }
    assert classes == {*TRAFFIC_CLASSES, metrics.OTHER_CLASS}
    text = ""
    for server in (observed.server, observed.bad):
        targets = json.loads(metrics_discovery(server).read_text())
        text += "".join(
            httpx.get(f"http://{a}/metrics", timeout=10).text for group in targets for a in group["targets"]
        )
    assert "ray_dflash_requests_total" in text
    for secret in SECRETS:
        assert secret not in text


def test_one_line_and_one_span_say_what_became_of_a_request(observed: Observed, collector: Collector) -> None:
    request_id = "observed-1"
    observed.server.client(API_KEYS[0]).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=32,
        user=SECRETS[1],
        extra_headers={
            "x-request-id": request_id,
            "x-dflash-traffic-class": "batch",
            "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
        },
    )
    deadline = time.monotonic() + 20
    spans: list[Span] = []
    lines: list[str] = []
    while not (spans and lines):
        assert time.monotonic() < deadline, f"{len(collector.spans)} spans, {len(lines)} lines"
        time.sleep(0.5)
        spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
        lines = [line for line in replica_logs(observed.server) if f'"request_id": "{request_id}"' in line]
    (span,), (line,) = spans, lines
    fields = json.loads(line[line.index("{") :])
    assert fields["trace_id"] == TRACE
    assert (fields["status"], fields["outcome"], fields["traffic_class"]) == (200, "ok", "batch")
    assert fields["completion_tokens"] == 32
    assert 1 < fields["acceptance_length"] <= DRAFT_TOKENS + 1
    assert 0 < fields["ttft_seconds"] <= fields["duration_seconds"]
    attributes = {item.key: item.value for item in span.attributes}
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 32
    assert request_id in attributes["gen_ai.request.id"].string_value
    for secret in SECRETS:
        assert secret not in line
        assert secret not in str(span)


def test_top_shows_the_fleet(observed: Observed) -> None:
    command = [str(BIN / "dflash-serve"), "top", "--once", "--prometheus", observed.prometheus.url]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    print(result.stdout)
    assert "DFlashAcceptanceCollapsed" in result.stdout
    for words in (MODEL, BAD_MODEL, "replicas 2 of 2 wanted", "position", "█"):
        assert words in result.stdout


def test_an_idle_replica_shows_no_stale_acceptance(observed: Observed) -> None:
    """Ray's agent drops a gauge that is no longer set (two export periods): nothing of ours stays behind."""
    # the window, two export periods, and what scraping takes
    deadline = time.monotonic() + BAD_WINDOW_SECONDS + 30 + 20
    asked = f'{metrics.ACCEPTANCE_LENGTH.exported_name}{{model="{BAD_MODEL}"}}'
    assert observed.prometheus.query(f"last_over_time({asked}[5m])")
    while observed.prometheus.query(asked):
        assert time.monotonic() < deadline, "the gauge still stands"
        time.sleep(1)
    assert observed.prometheus.query(f'{metrics.RUNNING_REQUESTS.exported_name}{{model="{BAD_MODEL}"}}')
