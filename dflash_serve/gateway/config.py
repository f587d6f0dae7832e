"""What the gateway allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dflash_serve.gateway.auth import ApiKeys
from dflash_serve.gateway.routes import parse_route
from dflash_serve.gateway.traffic import TrafficClasses

DENIED_FIELDS = frozenset(
    {
        # A tensor, or Jinja source, that the server would load or run.
        "prompt_embeds",
        "chat_template",
        "chat_template_kwargs.chat_template",
        # Handles to KV blocks of other requests and hosts. `vllm_xargs` reaches the same place in the engine
        # (vllm/v1/request.py reads `kv_transfer_params` out of it).
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        # Lets a client size the image and video processing that the server does.
        "mm_processor_kwargs",
        "media_io_kwargs",
    }
)
"""Request fields that are refused unless null. A dot names a field inside an object."""


@dataclass(frozen=True)
class GatewayConfig:
    """Limits and access of one replica. The defaults are safe on a developer's machine.

    Raises ValueError, naming the field, when a value makes no sense.
    """

    api_keys: ApiKeys | None = None
    """Keys that open every route; None leaves `anonymous` to decide. See `load_api_keys`."""

    anonymous: Literal["loopback", "anywhere"] = "loopback"
    """Who may call without a key, when there are none: this machine only, or anyone. A proxy that hides the client's
    address (no X-Forwarded-For) makes its clients look local: bind such a proxy to loopback, or set keys."""

    max_body_bytes: int = 16 * 1024 * 1024
    """Largest request body in bytes; above it 413."""

    max_output_tokens: int | None = None
    """Most tokens that a request may ask for; above it 400. None: the context's length decides. A request that does
    not say is bounded by vLLM's `override_generation_config: {"max_new_tokens": N}`; set both to the same N."""

    max_n: int = 8
    """Most choices (`n`) for one prompt; above it 400."""

    max_sequences: int = 64
    """Most sequences of one request, prompts times `n`; above it 400."""

    max_concurrent_requests: int | None = None
    """Generation requests in flight in this replica; above it 429 with Retry-After. None: no limit. Keep it below
    the limit of the server around it, whose refusal is plain text."""

    retry_after_seconds: int = 1
    """Value of Retry-After on 429 and 503."""

    denied_fields: frozenset[str] = DENIED_FIELDS
    """Request fields that are refused with 400; a dot names a field inside an object."""

    extra_routes: tuple[str, ...] = ()
    """More of the app's routes to open, as "POST /tokenize". They need a key like the rest; of the limits above only
    `max_body_bytes` holds for them."""

    set_request_id_header: bool = True
    """Put `x-request-id` on responses. False behind a server that puts it there itself (Ray Serve does, from the
    same request header), where the client would get it twice."""

    traffic: TrafficClasses = field(default_factory=TrafficClasses)
    """What requests are told apart by in metrics and in the access log."""

    def __post_init__(self) -> None:
        if self.anonymous not in ("loopback", "anywhere"):
            raise ValueError(f'anonymous must be "loopback" or "anywhere", not {self.anonymous!r}')
        for name in (
            "max_body_bytes",
            "max_output_tokens",
            "max_n",
            "max_sequences",
            "max_concurrent_requests",
            "retry_after_seconds",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for text in self.extra_routes:
            parse_route(text)
