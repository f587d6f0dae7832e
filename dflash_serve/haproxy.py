"""What HAProxy is told beyond the configuration that Ray Serve writes for it."""

from __future__ import annotations

import json

from dflash_serve.gateway.config import GatewayConfig
from dflash_serve.gateway.errors import ApiError, retry_headers

FAILURES = {
    502: "The replica stopped before it answered. Please retry.",
    503: "No replica can take the request at the moment. Please retry.",
    504: "The replica did not answer in time.",
}
"""What HAProxy itself answers when no replica does, by status. 504 only where someone has set a time."""


def balance() -> str:
    """The value of Ray's RAY_SERVE_HAPROXY_BALANCE_ALGORITHM: the replica with the fewest requests, and, on lines of
    their own, the errors in OpenAI's shape.

    Ray 2.60's template has one error page, in plain text and with the status 500 (`errorfile` in
    ray/serve/_private/haproxy_templates.py). It comes before this value, and HAProxy takes what comes last.
    """
    return "\n    ".join(["leastconn", *(_answer(status, message) for status, message in FAILURES.items())])


def _answer(status: int, message: str) -> str:
    # to ask for the same again at once would not help where the time was too short
    again = () if status == 504 else retry_headers(GatewayConfig.retry_after_seconds)
    error = ApiError(status, message, code="service_unavailable", headers=again)
    headers = "".join(f"hdr {name.decode()} {value.decode()} " for name, value in error.headers)
    body = json.dumps(error.payload("openai", ""))
    if "'" in body:
        raise ValueError(f"HAProxy's quotes cannot be in what they quote: {body}")
    return f"http-error status {status} content-type application/json {headers}string '{body}'"
