"""One server for the session, started as a user would start it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.local_server import Server, serving

API_KEYS = ("test-key-one", "test-key-two")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`dflash-serve up` with the bundled pair, float32, API keys, and few requests at once."""
    args = {
        "auth": {"keys_env": "DFLASH_TEST_KEYS"},
        "limits": {"max_concurrent_requests": 12, "max_output_tokens": 256, "max_body_bytes": 100_000},
        "engine": {"dtype": "float32"},
    }
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, args, environment={"DFLASH_TEST_KEYS": ",".join(API_KEYS)}) as running:
        yield running
