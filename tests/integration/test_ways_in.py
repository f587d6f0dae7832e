"""`serve run` with nothing set, and what `dflash-serve up` says to a bad configuration."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.local_server import BIN, MODEL, ROOT, serving, write_config

pytestmark = pytest.mark.integration


def test_serve_run_needs_no_environment(tmp_path: Path) -> None:
    with serving(tmp_path, {}, command="run") as server:
        client = server.client()
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Count from 1 to 20."}],
                temperature=0,
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.accepted_prediction_tokens
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = httpx.get(f"{server.url}/v1/models")
        assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            {"speculation": {"max_draft_tokens": 99}},
            "speculation.max_draft_tokens: 99 is more than the drafter's block",
        ),
        ({"limts": {"max_n": 2}}, "limts: unknown setting; did you mean limits?"),
        ({"routing": {"policy": "prefix_aware"}}, "routing.policy: prefix_aware does not work with Ray 2.60"),
    ],
)
def test_up_refuses_bad_settings_at_once(tmp_path: Path, args: dict[str, Any], words: str) -> None:
    config = write_config(tmp_path / "bad.yaml", 8000, args)
    started = time.monotonic()
    result = subprocess.run(
        [str(BIN / "dflash-serve"), "up", str(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert time.monotonic() - started < 30
