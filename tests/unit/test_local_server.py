"""Where the Ray session of a server started for tests and benchmarks is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.local_server import session_folder
from dflash_serve.bench.servers import Server


@pytest.mark.parametrize(
    ("variables", "folder"),
    [({"TMPDIR": "{}/a"}, "a/ray"), ({"TMPDIR": "{}/a", "RAY_TMPDIR": "{}/b"}, "b/ray")],
)
def test_a_session_is_where_the_servers_own_temporary_folder_is(
    variables: dict[str, str], folder: str, tmp_path: Path
) -> None:
    environment = {name: value.format(tmp_path) for name, value in variables.items()}
    with subprocess.Popen(["/bin/sleep", "60"], env=environment) as process:
        session = tmp_path / folder / f"session_2026-01-01_{process.pid}"
        for other in (session, session.with_name("session_2026-01-02_1"), session.with_name("session_latest")):
            other.mkdir(parents=True)
        try:
            assert session_folder(Server(0, process, tmp_path / "log")) == session
        finally:
            process.kill()
