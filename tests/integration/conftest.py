"""One server for the session, started as a user would start it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.collector import Collector
from benchmarks.local_server import Server, serving

API_KEYS = ("test-key-one", "test-key-two")
TRAFFIC_CLASSES = ("chat", "batch")
MAX_REQUESTS = 12
"""At once; more are shed."""


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    """`dflash-serve up` with the bundled pair, float32, API keys, few requests at once, and all that is observed."""
    args = {
        "auth": {"keys_env": "DFLASH_TEST_KEYS"},
        "limits": {"max_concurrent_requests": MAX_REQUESTS, "max_output_tokens": 256, "max_body_bytes": 100_000},
        "metrics": {
            "acceptance_window_seconds": 20,
            "traffic_classes": list(TRAFFIC_CLASSES),
            "otlp_traces_endpoint": collector.endpoint,
        },
        "engine": {"dtype": "float32"},
    }
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, args, environment={"DFLASH_TEST_KEYS": ",".join(API_KEYS)}) as running:
        yield running
