"""Who may call: API keys, or no keys and a look at where the caller is."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dflash_serve.gateway.errors import ApiError
from dflash_serve.gateway.peers import forwarded_hosts, is_local_origin, is_local_peer

logger = logging.getLogger("dflash_serve.gateway")

RELOAD_INTERVAL_SECONDS = 1.0
"""How often, at most, a key file is looked at."""

MEND = "set auth.keys_env or auth.keys_file, or auth.anonymous: anywhere to serve anyone"


class ApiKeys:
    """A set of API keys; only their SHA-256 digests are kept.

    Args:
        keys: Keys that do not change.
        file: One key a line, `#` starts a comment line. Read again when it changes, so that keys rotate without a
            restart; while it is unreadable or empty the last good keys stay valid.

    Raises:
        ValueError: No keys at all, or the file is missing, unreadable or empty.
    """

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        self._fixed = frozenset(map(_digest, keys))
        self._file = file
        self._digests: tuple[bytes, ...] = tuple(self._fixed)
        self._stamp: tuple[int, ...] | None = None
        self._next_look_seconds = 0.0
        if file is not None:
            try:
                self._load(file)
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot take API keys from {file}: {_reason(error)}") from None
        if not self._digests:
            raise ValueError("no API keys: give at least one")

    def __len__(self) -> int:
        return len(self._digests)

    def accepts(self, key: bytes) -> bool:
        """Whether `key` is one of the keys. Takes the same time whichever it is."""
        self._reload_if_changed()
        digest = hashlib.sha256(key).digest()
        accepted = False
        for known in self._digests:
            accepted |= hmac.compare_digest(digest, known)
        return accepted

    def _load(self, file: Path) -> None:
        stamp = _stamp(file)
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        digests = {_digest(line) for line in lines if line and not line.startswith("#")}
        if not digests:
            raise ValueError("it has no keys (one a line; lines that start with # are comments)")
        self._stamp = stamp
        self._digests = tuple(self._fixed | digests)

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._next_look_seconds:
            return
        self._next_look_seconds = now + RELOAD_INTERVAL_SECONDS
        try:
            if _stamp(self._file) != self._stamp:
                self._load(self._file)
                logger.info("API keys read again from %s: %d keys", self._file, len(self._digests))
        except (OSError, ValueError) as error:
            logger.error("API keys stay as they were: cannot read %s: %s", self._file, _reason(error))


def load_api_keys(env_name: str | None, file: Path | None) -> ApiKeys | None:
    """Keys from an environment variable (separated by commas or newlines) and from a file; None when neither is
    named.

    Raises:
        ValueError: A source is named but has no keys; says which and what to do.
    """
    if env_name is None and file is None:
        return None
    keys: list[str] = []
    if env_name is not None:
        keys = [key.strip() for key in os.environ.get(env_name, "").replace("\n", ",").split(",") if key.strip()]
        if not keys:
            raise ValueError(f"no API keys in the environment variable {env_name}: set it, or drop auth.keys_env")
    return ApiKeys(keys, file)


class Authorizer:
    """Decides whether a request may pass."""

    def __init__(self, keys: ApiKeys | None, anonymous: str, local_addresses: Collection[str]) -> None:
        self._keys = keys
        self._anonymous = anonymous
        self._local_addresses = local_addresses

    def check(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes], *, preflight: bool = False) -> None:
        """Raise ApiError when the caller may not pass.

        Args:
            headers: The scope's headers, the first of each name.
            preflight: A browser's CORS question, which never carries a key.
        """
        if self._keys is not None:
            if not preflight and not any(map(self._keys.accepts, presented_keys(headers))):
                raise _unauthorised(headers)
        elif self._anonymous == "loopback":
            client = scope.get("client")
            hosts = [client[0] if client else None, *forwarded_hosts(scope["headers"])]
            if not all(is_local_peer(host, self._local_addresses) for host in hosts):
                raise ApiError(
                    401,
                    f"This server has no API keys and serves its own machine only. Its operator can {MEND}.",
                    code="invalid_api_key",
                    headers=((b"www-authenticate", b"Bearer"),),
                )
            origin = headers.get(b"origin")
            if origin is not None and not is_local_origin(origin.decode("latin-1"), self._local_addresses):
                raise ApiError(
                    403,
                    "This server has no API keys and takes browser requests from its own machine's pages only. "
                    f"Its operator can {MEND}.",
                    code="origin_not_allowed",
                )


def presented_keys(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """Keys that a request brings, as OpenAI's clients (`Authorization: Bearer`) or Anthropic's (`x-api-key`) do."""
    keys = []
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and credentials.strip():
        keys.append(credentials.strip())
    if key := headers.get(b"x-api-key", b"").strip():
        keys.append(key)
    return keys


def _unauthorised(headers: Mapping[bytes, bytes]) -> ApiError:
    message = (
        "The API key is not valid."
        if presented_keys(headers)
        else "No API key was given. Send it as `Authorization: Bearer YOUR_KEY`."
    )
    return ApiError(401, message, code="invalid_api_key", headers=((b"www-authenticate", b"Bearer"),))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _stamp(file: Path) -> tuple[int, ...]:
    """Changes with the file, also when a new one is renamed or symlinked over it within the clock's resolution."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
