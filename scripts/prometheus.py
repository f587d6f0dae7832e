"""Put `prometheus` and `promtool` where the tests and `make monitor` look. Standard library only; no root needed.

    python3 scripts/prometheus.py [--into .venv/bin] [--optional]

Does nothing where both are installed. Else takes Debian's package (or Ubuntu's) without installing it: the two
programs are Go binaries that need libc alone. Where that cannot be had it fails after seconds; with --optional it says
so and goes on, and the tests that need Prometheus are skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = ("prometheus", "promtool")
PACKAGE = "prometheus"
SILENT_SECONDS = 4
"""How long a mirror may say nothing, at the start or between two pieces; apt asks it once."""
ELSE = "install Prometheus (https://prometheus.io/download/) so that prometheus and promtool are on PATH"


def installed(folder: Path) -> bool:
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return all(shutil.which(name, path=path) for name in PROGRAMS)


def run(command: list[str], folder: Path) -> str | None:
    """None, or what the command said when it failed."""
    result = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return None if result.returncode == 0 else result.stdout[-2000:]


def apt(*words: str) -> list[str]:
    """An apt-get command that does not wait for a mirror which does not answer."""
    patience = {
        "Acquire::Retries": 0,
        "Acquire::http::Timeout": SILENT_SECONDS,
        "Acquire::https::Timeout": SILENT_SECONDS,
    }
    options = {"APT::Sandbox::User": ""} | patience
    return ["apt-get", *(f"--option={name}={value}" for name, value in options.items()), *words]


def private_lists(folder: Path) -> list[str]:
    """Options that have apt keep its lists in `folder`: the system's may be missing, and only root may write them."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return [
        f"--option=Dir::State={folder / 'state'}",
        "--option=Dir::State::status=/var/lib/dpkg/status",
        f"--option=Dir::Cache={folder / 'cache'}",
    ]


def download(folder: Path) -> str | None:
    """The package into `folder`; None, or what went wrong."""
    if run(apt("download", PACKAGE), folder) is None:
        return None
    options = private_lists(folder)
    return run(apt(*options, "update"), folder) or run(apt(*options, "download", PACKAGE), folder)


def get(folder: Path) -> str | None:
    """The programs into `folder`; None, or what went wrong."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return f"[setup] no {' and '.join(PROGRAMS)} here, and no apt-get to get them with: {ELSE}"
    print(f"[setup] getting {' and '.join(PROGRAMS)} (Debian's package, 19 MB)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        problem = download(work)
        packages = list(work.glob("*.deb"))
        if problem is None and packages:
            problem = run(["dpkg-deb", "--extract", str(packages[0]), "unpacked"], work)
        if problem is not None or not packages:
            return f"{problem or ''}\n[setup] could not get the package {PACKAGE}; apt's words are above. Else {ELSE}"
        folder.mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS:
            shutil.copy2(work / "unpacked" / "usr" / "bin" / program, folder / program)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path(__file__).resolve().parent.parent / ".venv" / "bin")
    parser.add_argument("--optional", action="store_true", help="without them, warn and end well")
    arguments = parser.parse_args()
    folder: Path = arguments.into.resolve()
    problem = None if installed(folder) else get(folder)
    if problem is not None and not arguments.optional:
        sys.exit(problem)
    if problem is not None:
        print(f"{problem}\n[setup] going on without: tests that need Prometheus will be skipped", file=sys.stderr)


if __name__ == "__main__":
    main()
