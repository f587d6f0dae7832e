"""What is known of a request once it has ended."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Literal

from dflash_serve.metrics import OTHER_CLASS

access_log = logging.getLogger("dflash_serve.access")

CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client left before the response began (nginx's convention)."""


@dataclass
class RequestRecord:
    """One request. Counts are None when they are not known, such as after a disconnect. Holds no text and no key."""

    request_id: str
    method: str
    route: str
    """Template of an open route, or "other"."""
    status: int = CLIENT_CLOSED_REQUEST
    stream: bool = False
    traffic_class: str = OTHER_CLASS
    trace_id: str | None = None
    """Of the W3C `traceparent` header that the request brought; the engine's span has the same."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    num_drafts: int | None = None
    """Verifications: target passes that checked draft tokens."""
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    ttft_seconds: float | None = None
    """From arrival to the first generated content of a stream, else to the start of the response."""
    duration_seconds: float = 0.0
    outcome: Literal["ok", "shed", "rejected", "error", "disconnected"] = "ok"
    """`shed`: the replica was at its limit of concurrent requests; `rejected`: any other 4xx by us."""

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per verification, bonus token included; None when nothing was verified or it is not known."""
        if self.accepted_tokens is None or not self.num_drafts:
            return None
        return 1 + self.accepted_tokens / self.num_drafts

    @property
    def time_per_output_token_seconds(self) -> float | None:
        """Mean time between output tokens, the first apart; None for what is no whole stream of two tokens or more."""
        if not self.stream or self.outcome != "ok" or self.ttft_seconds is None or (self.completion_tokens or 0) < 2:
            return None
        assert self.completion_tokens is not None
        return (self.duration_seconds - self.ttft_seconds) / (self.completion_tokens - 1)

    def log(self, model_id: str, level: int) -> None:
        """Write the access line: one JSON object."""
        if not access_log.isEnabledFor(level):
            return
        line = {
            "model": model_id,
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "outcome": self.outcome,
            "stream": self.stream,
            "traffic_class": self.traffic_class,
            "trace_id": self.trace_id,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "num_drafts": self.num_drafts,
            "draft_tokens": self.draft_tokens,
            "accepted_tokens": self.accepted_tokens,
            "acceptance_length": _rounded(self.acceptance_length, 3),
            "ttft_seconds": _rounded(self.ttft_seconds, 6),
            "tpot_seconds": _rounded(self.time_per_output_token_seconds, 6),
            "duration_seconds": _rounded(self.duration_seconds, 6),
        }
        access_log.log(level, json.dumps(line))


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
