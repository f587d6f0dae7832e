"""Pods without Kubernetes: processes in network, process and mount namespaces of their own, on a bridge that nothing
outside reaches. A pod has its own address and loopback, so every port is what it is in a cluster, its own /tmp/ray and
/dev/shm, and is killed whole. Linux; as root, or where user namespaces are allowed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

OWN_PROCESSES = ("--pid", "--fork", "--kill-child", "--mount-proc")
TOOLS = ("unshare", "nsenter", "ip", "mount")
INSIDE = "DFLASH_POD_NETWORK"
"""Set in the environment of the process that has the bridge."""
GATEWAY = "10.77.0.1"
NETWORK = "10.77.0"
ENTER = """
set -e
# a share of the CPUs, where Linux groups processes by session
(echo "$POD_NICE" > /proc/self/autogroup) 2>/dev/null || true
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add "$POD_ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$POD_GATEWAY"
mount --make-rprivate /
mkdir -p "$POD_FOLDER/ray" "$POD_FOLDER/haproxy" "$POD_FOLDER/etc" "$POD_FOLDER/etc-work" /tmp/ray /tmp/haproxy-serve
mount --bind "$POD_FOLDER/ray" /tmp/ray
mount --bind "$POD_FOLDER/haproxy" /tmp/haproxy-serve
mount -t tmpfs tmpfs /dev/shm
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$POD_FOLDER/etc,workdir=$POD_FOLDER/etc-work" /etc
mkdir -p "$(dirname "$POD_SECRET")"
cp "$POD_SECRET_FROM" "$POD_SECRET"
mount --bind "$POD_HOSTS" /etc/hosts
# a name that is not in there does not exist; nobody is to wait for a name server
rm -f /etc/resolv.conf
echo "nameserver 127.0.0.1" > /etc/resolv.conf
echo "$0" > /proc/sys/kernel/hostname
exec "$@"
"""


def missing() -> str | None:
    """Why pods cannot be made here; None when they can."""
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(absent)} not found (Debian: util-linux, iproute2)"
    probe = subprocess.run([*_unshare(), "ip", "link", "add", "x", "type", "bridge"], capture_output=True, check=False)
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


def enter_network() -> None:
    """Run this program again in a network of its own, once, and make the bridge there."""
    if INSIDE not in os.environ:
        if (why := missing()) is not None:
            sys.exit(f"pods cannot be made: {why}")
        arguments = [sys.executable, *(["-m", module] if (module := _module()) else []), *sys.argv[1:]]
        os.execvpe("unshare", [*_unshare(), *arguments], os.environ | {INSIDE: "1"})
    # this is the namespace's first process, which no signal without a handler reaches
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for command in (
        "link set lo up",
        "link add pods type bridge",
        f"address add {GATEWAY}/24 dev pods",
        "link set pods up",
    ):
        _ip(command)


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # with a process namespace of its own, nothing outlives it
    return ["unshare", *user, "--net", "--mount", *OWN_PROCESSES]


def _module() -> str | None:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else None


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@dataclass
class Network:
    """The pods of a run, and how they find each other."""

    folder: Path
    names: dict[str, str] = field(default_factory=dict)
    """Host name -> address: what cluster DNS would answer."""
    _last: int = 1

    def address(self) -> str:
        """One that no pod has had before: a new pod has a new address."""
        self._last += 1
        return f"{NETWORK}.{self._last}"

    @property
    def hosts(self) -> Path:
        return self.folder / "hosts"

    def publish(self, name: str, address: str) -> None:
        """Let every pod, also those that run, find `name` at `address`."""
        self.names[name] = address
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.names.items())]
        # written in place: pods have the file itself mounted
        self.hosts.write_text("\n".join(lines) + "\n")


@dataclass
class Pod:
    """A pod and its one container's command."""

    name: str
    address: str
    folder: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        network: Network,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        *,
        secret: tuple[str, Path],
        nice: int,
        address: str | None = None,
    ) -> Pod:
        """
        Args:
            environment: All of it; nothing is inherited.
            nice: Of all its processes together, against other pods: each step is a fifth less CPU when it is short.
            secret: A file of the pod, and the file that it is a copy of.
        """
        address = address or network.address()
        folder = network.folder / name
        folder.mkdir()
        network.publish(name, address)
        own = {
            "POD_ADDRESS": address,
            "POD_GATEWAY": GATEWAY,
            "POD_FOLDER": str(folder),
            "POD_HOSTS": str(network.hosts),
            "POD_NICE": str(nice),
            "POD_SECRET": secret[0],
            "POD_SECRET_FROM": str(secret[1]),
        }
        isolated = ["unshare", "--net", "--mount", "--uts", "--ipc", *OWN_PROCESSES]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*isolated, "bash", "-c", ENTER, name, *command],
                env={**environment, **own},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        pod = cls(name, address, folder, environment, process)
        pod._connect()
        return pod

    def _connect(self) -> None:
        ours = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self.process.pid}/ns/net") == ours:
            time.sleep(0.01)
        outside = f"v{self.address.rsplit('.', 1)[-1]}"
        _ip(f"link add {outside} type veth peer name eth0 netns {self.process.pid}")
        _ip(f"link set {outside} master pods up")

    def execute(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start another command in the pod; its output goes to `hook.log` in the pod's folder."""
        (first,) = psutil.Process(self.process.pid).children()
        enter = ["nsenter", "--all", "--target", str(first.pid), f"--wd={os.getcwd()}"]
        with (self.folder / "hook.log").open("wb") as log:
            return subprocess.Popen(
                [*enter, *command], env=dict(self.environment), stdout=log, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        """All of its processes at once, as when its machine is lost; none answers any more when this returns."""
        # the first process of the namespace ends after all others in it, and unshare after that one; to kill unshare
        # itself would return while they die
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children() or [self.process]:
                process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def log_tail(self, characters: int = 3000) -> str:
        return (self.folder / "log").read_text(errors="replace")[-characters:]
