"""scripts/prometheus.py where Prometheus cannot be had: it takes seconds, whatever the reason."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.local_server import ROOT

pytestmark = pytest.mark.integration

SECONDS = 30
needs_apt = pytest.mark.skipif(shutil.which("apt-get", path="/usr/bin") is None, reason="no apt-get here")


@pytest.fixture(params=["silent", "closed"])
def mirror(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a mirror that takes connections and says nothing, or takes none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/debian"
        if request.param == "closed":
            server.close()
        yield address


def get_it(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "prometheus.py"), "--into", str(folder / "bin"), *options]
    started = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert time.monotonic() - started < SECONDS
    return result


@needs_apt
def test_a_mirror_that_does_not_answer_costs_seconds(tmp_path: Path, mirror: str) -> None:
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] {mirror} bookworm main\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "{tmp_path}/none";\n'
        f'Dir::State "{tmp_path}/state";\n'
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "dpkg-deb"):
        (tools / name).symlink_to(Path("/usr/bin") / name)
    result = get_it(tmp_path, APT_CONFIG=str(tmp_path / "apt.conf"), PATH=str(tools))
    assert result.returncode == 1, result.stdout
    assert "could not get the package prometheus" in result.stderr


def test_without_apt_it_says_what_to_do_and_insists_unless_it_is_optional(tmp_path: Path) -> None:
    for options, code in (((), 1), (("--optional",), 0)):
        result = get_it(tmp_path, *options, PATH=str(tmp_path))
        assert result.returncode == code
        assert "install Prometheus (https://prometheus.io/download/)" in result.stderr
        assert ("will be skipped" in result.stderr) == (code == 0)
