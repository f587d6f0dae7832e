"""Which traffic class a request belongs to, and the trace that it is part of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dflash_serve.gateway.auth import presented_keys
from dflash_serve.metrics import OTHER_CLASS

TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00."""


@dataclass(frozen=True)
class TrafficClasses:
    """The classes that exist. Whatever else a client says is "other", so that it cannot make series."""

    names: tuple[str, ...] = ()
    header: str = "x-dflash-traffic-class"
    by_key_digest: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of an API key, in hex -> the class of all that comes with that key, whatever the header says."""

    def __post_init__(self) -> None:
        for name in self.by_key_digest.values():
            if name not in self.names:
                raise ValueError(f"traffic_class_keys: {name!r} is not in traffic_classes ({', '.join(self.names)})")

    def of(self, headers: Mapping[bytes, bytes]) -> str:
        """The class of a request with these headers (the first of each name)."""
        if not self.names:
            return OTHER_CLASS
        if self.by_key_digest:
            for key in presented_keys(headers):
                name = self.by_key_digest.get(hashlib.sha256(key).hexdigest())
                if name is not None:
                    return name
        asked = headers.get(self.header.encode(), b"").decode("latin-1").strip()
        return asked if asked in self.names else OTHER_CLASS


def trace_id(headers: Mapping[bytes, bytes]) -> str | None:
    """The trace id of a `traceparent` header; None without one, or when it is not valid."""
    match = TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
    return match[1].decode() if match else None
