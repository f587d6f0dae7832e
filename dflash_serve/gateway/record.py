"""What is known of a request once it has ended."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Literal

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
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    num_drafts: int | None = None
    """Verifications: target passes that checked draft tokens."""
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    ttft_seconds: float | None = None
    """From arrival to the first generated content of a stream, else to the start of the response."""
    duration_seconds: float = 0.0
    outcome: Literal["ok", "rejected", "error", "disconnected"] = "ok"

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per verification, bonus token included; None when nothing was verified or it is not known."""
        if self.accepted_tokens is None or not self.num_drafts:
            return None
        return 1 + self.accepted_tokens / self.num_drafts

    def log(self, model_id: str, level: int) -> None:
        """Write the access line: one JSON object."""
        if not access_log.isEnabledFor(level):
            return
        acceptance_length = self.acceptance_length
        line = {
            "model": model_id,
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "outcome": self.outcome,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "num_drafts": self.num_drafts,
            "draft_tokens": self.draft_tokens,
            "accepted_tokens": self.accepted_tokens,
            "acceptance_length": None if acceptance_length is None else round(acceptance_length, 3),
            "ttft_seconds": None if self.ttft_seconds is None else round(self.ttft_seconds, 6),
            "duration_seconds": round(self.duration_seconds, 6),
        }
        access_log.log(level, json.dumps(line))
