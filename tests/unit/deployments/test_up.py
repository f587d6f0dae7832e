"""Ports and folders of a session's own."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from deployments import up


@pytest.fixture(autouse=True)
def claims() -> Iterator[None]:
    yield
    release()


def release() -> None:
    """As the end of the process does."""
    while up._claims:
        up._claims.pop().close()


def test_a_session_takes_no_port_that_is_listened_on() -> None:
    with socket.socket() as taken:
        # as Ray's replicas bind
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert up._free_port(port) == 0
    assert up._free_port(port) == port


def test_two_sessions_have_ports_of_their_own() -> None:
    ports = up._ports_of_our_own()
    first = ports.pop("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT")
    last = ports.pop("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
    assert last - first + 1 == up.REPLICA_PORT_BLOCK
    assert up.REPLICA_PORTS[0] <= first
    assert last < up.REPLICA_PORTS[1]
    assert len(set(ports.values())) == len(ports) == 4
    # another that starts before anything is bound
    other = up._ports_of_our_own()
    assert not {first, *ports.values()} & set(other.values())
    release()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert up._ports_of_our_own()["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] != first


def test_a_port_is_claimed_before_it_is_bound_and_until_its_process_ends() -> None:
    port = up._free_port()
    program = f"from deployments import up; print(up._own_port({port}), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) == port
        assert up._free_port(port) == port
        assert up._own_port(port) not in (0, port)
        other.kill()
    assert up._own_port(port) == port


def test_haproxy_paths_stay_short_where_the_temporary_folder_is_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("a" * 60)))
    socket_path = up._haproxy_folder() / ("f" * 56) / "admin.sock"
    assert len(str(socket_path)) <= 97
