"""Model files in a folder that many machines read: fetched once, checked, and put in place whole.

    python -m dflash_serve.models fetch /models google/gemma-4-31B-it@<revision> z-lab/gemma-4-31B-it-DFlash
    python -m dflash_serve.models wait  /models google/gemma-4-31B-it@<revision> z-lab/gemma-4-31B-it-DFlash

`fetch` is what the Job of the Kubernetes manifests runs, `wait` what a pod does before it starts. A model is a hub name
with or without a revision, or a bundled `demo:` name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from dflash_serve import demo

DEFAULT_REVISION = "main"
CHECKSUMS = "SHA256SUMS"
"""Written last, so that a folder which has it is whole. `sha256sum -c SHA256SUMS` checks it anew."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
BLOCK_BYTES = 16 * 1024 * 1024
PROGRESS_SECONDS = 10.0
WAIT_SECONDS = 5.0

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Model files in a shared folder.")
Names = Annotated[list[str], typer.Argument(metavar="MODEL[@REVISION]...", help="Hub names, or demo: names.")]
Root = Annotated[Path, typer.Argument(help="The shared folder.")]


class ModelError(RuntimeError):
    """A model cannot be had whole; the message says what to do."""


@dataclass(frozen=True)
class Model:
    """A model by name."""

    name: str
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> Model:
        name, _, revision = text.partition("@")
        return cls(name, revision or DEFAULT_REVISION)

    @property
    def bundled(self) -> bool:
        return self.name.startswith(demo.PREFIX)

    @property
    def on_hub(self) -> bool:
        """Whether the name is one of the hub: not bundled, no path, no bucket."""
        return HUB_NAME.fullmatch(self.name) is not None

    def folder(self, root: Path) -> Path:
        """Where it lies; revisions lie side by side, so that an upgrade leaves the running one alone."""
        return root / self.name.replace("/", "--") / self.revision

    def __str__(self) -> str:
        return self.name if self.bundled else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class File:
    """What the hub says of one file."""

    path: str
    size_bytes: int
    sha256: str | None
    """Of a large file."""
    git_sha1: str | None
    """Of a small one: git's own digest of a blob."""


def is_whole(model: Model, root: Path) -> bool:
    """Whether `fetch` has finished with it."""
    if model.bundled:
        return model.name == demo.DRAFTER or demo.target_folder().is_dir()
    return (model.folder(root) / CHECKSUMS).is_file()


def fetch(model: Model, root: Path, say: Callable[[str], None]) -> Path:
    """Download, check and put in place; does nothing when it is there, and goes on where it was interrupted.

    Raises ModelError when the hub refuses or a file is not what the hub says, demo.DemoError, OSError.
    """
    if model.bundled:
        return Path(demo.resolve(model.name))
    folder = model.folder(root)
    if not model.on_hub:
        raise ModelError(f"{model.name} is no name of the hub: give owner/name, with @revision or without")
    if is_whole(model, root):
        say(f"{model}: already whole in {folder}")
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    files = _download(model, unfinished, say)
    sums = check(unfinished, files, lambda text: say(f"{model}: {text}"))
    # the downloader's own notes
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)
    (unfinished / CHECKSUMS).write_text("".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items())))
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    say(f"{model}: whole in {folder}")
    return folder


def check(folder: Path, files: list[File], say: Callable[[str], None]) -> dict[str, str]:
    """Compare every file with what the hub says of it. Returns each one's SHA-256 by path.

    Raises ModelError; a file that is wrong is removed, so that the next run fetches it again.
    """
    total = sum(file.size_bytes for file in files) or 1
    sums, done, next_word = {}, 0, time.monotonic() + PROGRESS_SECONDS
    for file in files:
        path = folder / file.path
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        try:
            with path.open("rb") as source:
                while block := source.read(BLOCK_BYTES):
                    sha256.update(block)
                    if file.sha256 is None:
                        sha1.update(block)
                    done += len(block)
                    if time.monotonic() >= next_word:
                        say(f"checked {done / total:.0%}")
                        next_word = time.monotonic() + PROGRESS_SECONDS
        except FileNotFoundError:
            raise ModelError(f"{file.path} is missing after the download: run this again") from None
        wanted, found = (
            (file.sha256, sha256.hexdigest()) if file.sha256 is not None else (file.git_sha1, sha1.hexdigest())
        )
        if wanted != found:
            path.unlink()
            raise ModelError(f"{file.path} has digest {found}, and the hub says {wanted}: removed; run this again")
        sums[file.path] = sha256.hexdigest()
    say(f"checked {len(files)} files")
    return sums


def _download(model: Model, to: Path, say: Callable[[str], None]) -> list[File]:
    """All files of the revision, into `to`."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    # bars of a terminal; ours is a line now and then
    disable_progress_bars()
    try:
        info = HfApi().model_info(model.name, revision=model.revision, files_metadata=True)
        files = [
            File(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id) for s in info.siblings or []
        ]
        total = sum(file.size_bytes for file in files)
        say(f"{model}: commit {info.sha}, {len(files)} files, {total / 1e9:.1f} GB")
        with _progress(to, total, lambda text: say(f"{model}: {text}")):
            snapshot_download(model.name, revision=info.sha, local_dir=to)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = (
            "accept the model's licence on the hub and give a token of that account in HF_TOKEN"
            if status in (401, 403)
            else "see whether the name and the revision are right and the hub can be reached"
        )
        raise ModelError(f"{model}: the hub answered {status}: {hint}") from None
    except _transport_errors() as error:
        raise ModelError(f"{model}: the hub cannot be reached ({error}): run this again") from None
    return files


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises without an answer: huggingface_hub 1 speaks through httpx, 2 through httpx2."""
    names = [name for name in ("httpx", "httpx2") if find_spec(name) is not None]
    return tuple(import_module(name).HTTPError for name in names)


@contextmanager
def _progress(folder: Path, total_bytes: int, say: Callable[[str], None]) -> Iterator[None]:
    """A line every few seconds: a Job's log is no terminal."""
    stop = threading.Event()
    started, before = time.monotonic(), _bytes_under(folder)

    def watch() -> None:
        while not stop.wait(PROGRESS_SECONDS):
            now = _bytes_under(folder)
            rate = (now - before) / (time.monotonic() - started)
            say(f"{now / 1e9:.1f} of {total_bytes / 1e9:.1f} GB, {now / (total_bytes or 1):.0%}, {rate / 1e6:.0f} MB/s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _bytes_under(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                # what is on the disk: an unfinished file may have its full length from the start
                total += (Path(directory) / name).stat().st_blocks * 512
            except OSError:
                continue
    return total


def _say(text: str) -> None:
    print(text, flush=True)


@app.command("fetch")
def fetch_command(root: Root, names: Names) -> None:
    """Fetch, check and put in place what is not there yet."""
    try:
        for name in names:
            fetch(Model.parse(name), root, _say)
    except (ModelError, demo.DemoError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command("wait")
def wait_command(root: Root, names: Names) -> None:
    """Wait until all of them are whole."""
    for model in map(Model.parse, names):
        waited = 0.0
        while not is_whole(model, root):
            if waited % 60 == 0:
                _say(f"waiting for {model} in {root}")
            time.sleep(WAIT_SECONDS)
            waited += WAIT_SECONDS


if __name__ == "__main__":
    app()
