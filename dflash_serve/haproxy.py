"""What HAProxy is told beyond the configuration that Ray Serve writes for it."""

from __future__ import annotations

import json

from dflash_serve.gateway.config import GatewayConfig
from dflash_serve.gateway.errors import unavailable

FAILURES = {
    502: "The replica stopped before it answered. Please retry.",
    503: "No replica can take the request at the moment. Please retry.",
    504: "The replica did not answer in time.",
}
"""What HAProxy itself answers when no replica does, by status. 504 only where someone has set a time."""


def variables() -> dict[str, str]:
    """Environment of every Ray node whose HAProxy takes requests, by name.

    A replica that stops closes its connections; a request that HAProxy had just put on one goes to another replica, for
    which all of it must be there first. Errors have OpenAI's shape: Ray 2.60's template has one page for them, in plain
    text and with the status 500 (`errorfile` in ray/serve/_private/haproxy_templates.py). The balancing algorithm is
    the last line of the section that all others inherit, so lines of ours can follow it there, and HAProxy takes what
    comes last.
    """
    ours = ["option http-buffer-request", *(_answer(status, message) for status, message in FAILURES.items())]
    return {
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # bytes of a request that may be sent twice, headers included; Ray's 16384 are a prompt of some 4000 tokens
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "131072",
        # the replica with the fewest requests
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "\n    ".join(["leastconn", *ours]),
    }


def _answer(status: int, message: str) -> str:
    error = unavailable(message, GatewayConfig.retry_after_seconds)
    # to ask for the same again at once would not help where the time was too short
    again = () if status == 504 else error.headers
    headers = "".join(f"hdr {name.decode()} {value.decode()} " for name, value in again)
    body = json.dumps(error.payload("openai", ""))
    if "'" in body:
        raise ValueError(f"HAProxy's quotes cannot be in what they quote: {body}")
    return f"http-error status {status} content-type application/json {headers}string '{body}'"
