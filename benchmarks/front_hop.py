"""What lies between client and replica with `dflash-serve up`: HAProxy.

    python -m benchmarks.front_hop [--requests 200]

The bundled pair's target behind `up`. The same requests go to the front and straight to the replica's own port, in
turn, so that all but the hop is the same; each pair's difference counts. One request at a time, of two kinds: one that
vLLM refuses at once (its model is unknown), for the hop without an engine's time, and one streamed token.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
import uuid
from pathlib import Path

import aiohttp
import psutil

from benchmarks.local_server import MODEL, Server, serving
from dflash_serve.bench.client import Endpoint, ask, session
from dflash_serve.bench.run import request_body
from dflash_serve.bench.servers import family
from dflash_serve.bench.summary import percentile

REPLICA = "ServeReplica:dflash:DFlashServer"
WARM_UP = 5
REFUSED, TOKEN = "refused at once", "first token"


def replica_url(server: Server) -> str:
    """Where the server's one replica listens. RuntimeError when it listens nowhere."""
    for process in family(server.process.pid):
        if REPLICA in " ".join(process.cmdline()):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == "127.0.0.1":
                    return f"http://127.0.0.1:{connection.laddr.port}"
    raise RuntimeError("no replica of the server listens on 127.0.0.1: does `up` stream directly?")


async def refusal_seconds(http: aiohttp.ClientSession, url: str, text: str) -> float:
    """Until the answer to a request for a model that is not there."""
    body = {"model": "none", "messages": [{"role": "user", "content": text}]}
    started = time.perf_counter()
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        await response.read()
        if response.status != 404:
            raise RuntimeError(f"{url} answers {response.status} to an unknown model")
    return time.perf_counter() - started


async def token_seconds(http: aiohttp.ClientSession, url: str, text: str) -> float:
    """Until the first token of an answer of one."""
    body = request_body(1, thinking=None, ignore_eos=True)
    endpoint = Endpoint(f"{url}/v1", model=MODEL, body=body, salted=True)
    answer = await ask(http, endpoint, [{"role": "user", "content": text}], uuid.uuid4().hex)
    if answer.error or answer.ttft_seconds is None:
        raise RuntimeError(f"{url}: {answer.error}")
    return answer.ttft_seconds


async def in_turn(front: str, replica: str, requests: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by front and replica of each request, of each kind; they take turns to be first."""
    pairs: dict[str, list[tuple[float, float]]] = {REFUSED: [], TOKEN: []}
    async with session() as http:
        for kind, seconds in ((REFUSED, refusal_seconds), (TOKEN, token_seconds)):
            for number in range(-WARM_UP, requests):
                found = {}
                for url in (front, replica) if number % 2 else (replica, front):
                    found[url] = await seconds(http, url, f"Count from {number + WARM_UP}.")
                if number >= 0:
                    pairs[kind].append((found[front], found[replica]))
    return pairs


def table(pairs: dict[str, list[tuple[float, float]]]) -> str:
    """Medians in milliseconds, what the front adds, and the middle half of that."""
    lines = [f"{'milliseconds':18} {'replica':>9} {'front':>9} {'added':>9}   middle half of the pairs"]
    for kind, seconds in pairs.items():
        added = sorted(1000 * (front - replica) for front, replica in seconds)
        front, replica = (1000 * statistics.median(pair[side] for pair in seconds) for side in (0, 1))
        middle = f"{percentile(added, 25):+.2f} to {percentile(added, 75):+.2f}"
        lines.append(f"{kind:18} {replica:9.2f} {front:9.2f} {statistics.median(added):+9.2f}   {middle}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="of each kind, each way")
    options = parser.parse_args()
    args = {"profile": "smollm2-cpu", "speculation": {"mode": "off"}}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), args) as server:
        pairs = asyncio.run(in_turn(server.url, replica_url(server), options.requests))
    print(f"{options.requests} requests of each kind each way, one at a time")
    print(table(pairs))


if __name__ == "__main__":
    main()
