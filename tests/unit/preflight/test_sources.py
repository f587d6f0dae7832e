from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from dflash_serve.preflight import run
from dflash_serve.preflight.sources import Unavailable, read_config
from dflash_serve.settings import Cluster, resolve

CONFIG = {"hidden_size": 8}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_folder_and_a_bucket(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_config(str(tmp_path)) == CONFIG
    assert read_config(f"file://{tmp_path}/") == CONFIG
    with pytest.raises(ValueError, match=r"has no config\.json; name the folder"):
        read_config(f"file://{tmp_path}/nothing")
    with pytest.raises(ValueError, match="use s3://"):
        read_config("nonsense://bucket/model")


def test_a_folder_of_another_machine_is_not_a_hub_name() -> None:
    with pytest.raises(Unavailable, match="no folder /nowhere/model on this machine; it must be on each node"):
        read_config("/nowhere/model")


def test_offline_says_what_to_fetch(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"not in the cache .*HF_HUB_OFFLINE is set; .*hf download google/gemma"):
        read_config("google/gemma-4-31B-it")


def test_offline_takes_the_cache(hub: Path) -> None:
    commit = "a" * 40
    snapshot = hub / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    refs = hub / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert read_config("owner/name") == CONFIG
    assert read_config("owner/name", commit) == CONFIG


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", r"is gated; accept its terms at https://huggingface\.co/owner/name, then set HF_TOKEN"),
        (401, "RepoNotFound", "the hub shows no owner/name; check the name, and for a private one set HF_TOKEN"),
        (404, "RevisionNotFound", "has no revision v9"),
        (404, "EntryNotFound", r"has no config\.json"),
    ],
)
def test_what_the_hub_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, code: str, words: str
) -> None:
    """A hub that answers with the hub's own status and X-Error-Code, through huggingface_hub itself."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", "b" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert httpx.head(url).status_code == status
        with pytest.raises(ValueError, match=words):
            read_config("owner/name", "v9")
    finally:
        server.shutdown()
        thread.join()


def test_a_run_without_the_hub_still_checks_the_rest(hub: Path) -> None:
    settings = resolve({"profile": "gemma4-31b-h200"}, Cluster(cpus=8, gpus={})).settings
    report = run(settings)
    assert [error.partition(":")[0] for error in report.errors] == ["target", "drafter"]
    assert [warning.partition(":")[0] for warning in report.warnings] == ["target_revision", "drafter_revision"]
    assert report.memory is None


def test_too_many_draft_tokens_for_a_drafter_that_was_just_read(tmp_path: Path) -> None:
    from benchmarks.gemma4_shapes import drafter_config

    (tmp_path / "config.json").write_text(json.dumps(drafter_config(tiny=True)))
    args = {"profile": "smollm2-cpu", "drafter": str(tmp_path), "speculation": {"max_draft_tokens": 8}}
    settings = resolve(args, Cluster(cpus=2, gpus={}), read_config=lambda _: None).settings
    assert any(error.startswith("speculation.max_draft_tokens: 8 is more than") for error in run(settings).errors)


def test_the_bundled_pair_has_nothing_to_find() -> None:
    settings = resolve({"profile": "smollm2-cpu"}, Cluster(cpus=2, gpus={})).settings
    assert run(settings).findings == []
