"""Models in a shared folder: whole or not there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from dflash_serve import demo, models
from dflash_serve.models import File, Model, ModelError


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_of(folder: Path) -> list[File]:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_bytes(b"{}")
    return [
        File("model.safetensors", 7000, hashlib.sha256(b"weights" * 1000).hexdigest(), None),
        File("config.json", 2, None, git_sha1(b"{}")),
    ]


def test_revisions_lie_side_by_side() -> None:
    root = Path("/models")
    assert Model.parse("google/gemma-4-31B-it@abc").folder(root) == root / "google--gemma-4-31B-it" / "abc"
    assert Model.parse("google/gemma-4-31B-it").revision == "main"
    assert not Model.parse("/models/x").on_hub
    assert not Model.parse("s3://bucket/x").on_hub


def test_whole_files_give_sums_that_sha256sum_reads(tmp_path: Path) -> None:
    sums = models.check(tmp_path / "m", files_of(tmp_path / "m"), lambda _: None)
    assert sums["config.json"] == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_byte_is_found_and_the_file_removed(tmp_path: Path, name: str) -> None:
    files = files_of(tmp_path / "m")
    path = tmp_path / "m" / name
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ModelError, match=f"{name} has digest .* run this again"):
        models.check(tmp_path / "m", files, lambda _: None)
    assert not path.exists()


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    files = files_of(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        models.check(tmp_path / "m", files, lambda _: None)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/name"
CONTENT = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download asks for; the real client talks to it."""

    served: ClassVar[dict[str, bytes]] = {}
    status: ClassVar[int] = 200
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.status != 200:
            self.answer(b"", {}, self.status)
        elif "/tree/" in self.path:
            files: list[dict[str, Any]] = [
                {"type": "file", "path": n, "size": len(c), "oid": git_sha1(c)} for n, c in CONTENT.items()
            ]
            files[1]["lfs"] = {
                "oid": hashlib.sha256(CONTENT["model.safetensors"]).hexdigest(),
                "size": 7000,
                "pointerSize": 1,
            }
            self.answer(json.dumps(files).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/api/"):
            siblings: list[dict[str, Any]] = [
                {"rfilename": n, "size": len(c), "blobId": git_sha1(c)} for n, c in CONTENT.items()
            ]
            large = {"sha256": hashlib.sha256(CONTENT["model.safetensors"]).hexdigest(), "size": 7000, "pointerSize": 1}
            siblings[1]["lfs"] = large
            info = {"id": NAME, "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps(info).encode(), {"Content-Type": "application/json"})
        else:
            content = self.served[self.path.rsplit("/", 1)[-1]]
            self.answer(content, {"ETag": hashlib.sha256(content).hexdigest(), "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Own(Hub):
        served: ClassVar[dict[str, bytes]] = dict(CONTENT)
        asked: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    yield Own
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_is_fetched_checked_and_put_in_place_whole(hub: type[Hub], tmp_path: Path) -> None:
    result = CliRunner().invoke(models.app, ["fetch", str(tmp_path), f"{NAME}@v1"])
    assert result.exit_code == 0, result.output
    assert f"{NAME}@v1: commit {COMMIT}, 2 files" in result.output
    folder = tmp_path / "owner--name" / "v1"
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != models.CHECKSUMS} == CONTENT
    checked = subprocess.run(["sha256sum", "-c", models.CHECKSUMS], cwd=folder, capture_output=True, check=False)
    assert checked.returncode == 0
    assert [p.name for p in folder.parent.iterdir()] == ["v1"]
    asked = len(hub.asked)
    assert CliRunner().invoke(models.app, ["fetch", str(tmp_path), f"{NAME}@v1"]).exit_code == 0
    assert len(hub.asked) == asked, "nothing is asked for a model that is whole"


def test_what_arrives_wrong_is_not_put_in_place_and_fetched_again(hub: type[Hub], tmp_path: Path) -> None:
    hub.served["model.safetensors"] = b"Weights" * 1000
    result = CliRunner().invoke(models.app, ["fetch", str(tmp_path), NAME])
    assert result.exit_code == 1
    assert "model.safetensors has digest" in result.output
    assert not models.is_whole(Model(NAME), tmp_path)
    hub.served.update(CONTENT)
    assert CliRunner().invoke(models.app, ["fetch", str(tmp_path), NAME]).exit_code == 0
    assert models.is_whole(Model(NAME), tmp_path)


def test_a_refusal_says_what_to_do(hub: type[Hub], tmp_path: Path) -> None:
    hub.status = 403
    result = CliRunner().invoke(models.app, ["fetch", str(tmp_path), NAME])
    assert result.exit_code == 1
    assert "the hub answered 403: accept the model's licence" in result.output


def test_no_hub_says_so(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = CliRunner().invoke(models.app, ["fetch", str(tmp_path), NAME])
    assert result.exit_code == 1
    assert "the hub cannot be reached" in result.output


def test_a_whole_model_is_left_alone_and_not_waited_for(tmp_path: Path) -> None:
    model = Model("owner/name", "abc")
    model.folder(tmp_path).mkdir(parents=True)
    (model.folder(tmp_path) / models.CHECKSUMS).touch()
    for command in ("fetch", "wait"):
        assert CliRunner().invoke(models.app, [command, str(tmp_path), str(model)]).exit_code == 0


def test_what_is_no_name_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(models.app, ["fetch", str(tmp_path), "gemma"])
    assert "gemma is no name of the hub: give owner/name" in result.output


def test_the_bundled_pair_is_whole_when_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_SERVE_CACHE", str(tmp_path))
    assert models.is_whole(Model(demo.DRAFTER), tmp_path)
    assert not models.is_whole(Model(demo.TARGET), tmp_path)
    demo.target_folder().mkdir()
    assert models.is_whole(Model(demo.TARGET), tmp_path)
