"""A worker's last act: `python -m deployments.drain --deadline-seconds 1560`, a container's preStop hook.

Tells Ray that the node goes away, so that Serve starts a replica elsewhere and lets this one's streams end, then waits
until the node's replicas and its HAProxy have gone. It takes every process that it sees for this node's: in a container
they are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Annotated

import psutil
import typer

REASON = "DRAIN_NODE_REASON_PREEMPTION"
"""Serve moves replicas for this reason at once; for the other one, only when the node is idle."""
SERVING = ("ray::ServeReplica", "ray::HAProxyManager", "ray::ProxyActor")
"""How the processes that hold clients' streams call themselves."""
POLL_SECONDS = 1.0


def is_serving(process_titles: Iterable[str]) -> bool:
    """Whether one of the processes is a replica or a proxy."""
    return any(title.startswith(SERVING) for title in process_titles)


def main(*, deadline_seconds: Annotated[int, typer.Option(help="Seconds until the node is stopped anyway.")]) -> None:
    """Drain this node and wait until nothing on it serves."""
    deadline = time.monotonic() + deadline_seconds
    command = ["ray", "drain-node", "--reason", REASON, "--reason-message", "the pod stops"]
    result = subprocess.run([*command, "--deadline-remaining-seconds", str(deadline_seconds)], check=False)
    if result.returncode:
        # the head may be away; streams still get their time
        print("the drain was not accepted; waiting for the streams alone", file=sys.stderr, flush=True)
    while time.monotonic() < deadline and is_serving(_titles()):
        time.sleep(POLL_SECONDS)
    print("nothing serves here any more" if time.monotonic() < deadline else "out of time", flush=True)


def _titles() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    typer.run(main)
