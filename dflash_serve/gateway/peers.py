"""Whether a request comes from this machine."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

import psutil

_FORWARDED_FOR = re.compile(r'for="?([^";,]+)', re.IGNORECASE)


def local_addresses() -> frozenset[str]:
    """IP addresses of this machine's interfaces."""
    return frozenset(address.address.partition("%")[0] for nic in psutil.net_if_addrs().values() for address in nic)


def is_local_peer(host: str | None, local_addresses: Collection[str]) -> bool:
    """True for a loopback address and for an address of this machine; False for anything that is no IP address.

    Args:
        host: As a server or a proxy's header gives it: an IPv4 or IPv6 address, with or without brackets, zone, port.
        local_addresses: See `local_addresses()`.
    """
    try:
        address = ipaddress.ip_address(_bare(host or ""))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or str(address) in local_addresses


def is_local_origin(origin: str, local_addresses: Collection[str]) -> bool:
    """Whether a browser's Origin header names a page served by this machine.

    A web page from elsewhere can reach this machine through the user's own browser, directly or with a DNS name that
    it points here (DNS rebinding); its Origin gives it away.
    """
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:
        return False
    return host == "localhost" or host.endswith(".localhost") or is_local_peer(host, local_addresses)


def forwarded_hosts(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """Every client address that proxies on the way have written down."""
    hosts: list[str] = []
    for name, value in headers:
        text = value.decode("latin-1")
        if name in (b"x-forwarded-for", b"x-real-ip"):
            hosts += [part.strip() for part in text.split(",")]
        elif name == b"forwarded":
            hosts += _FORWARDED_FOR.findall(text) or [text]
    return hosts


def _bare(host: str) -> str:
    """Without brackets, port and zone."""
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    return host.partition("%")[0]
