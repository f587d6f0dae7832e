"""Reads a request's body once, bounded, and checks what it asks for."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NoReturn

from dflash_serve.gateway.config import GatewayConfig
from dflash_serve.gateway.errors import ApiError
from dflash_serve.gateway.routes import Route

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

MAX_JSON_DEPTH = 128
"""Deepest nesting of arrays and objects. Python's own limit (about 1000 frames) is too close: what parses here can
still overflow the stack of a template or a schema compiler further in."""

OUTPUT_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class ClientDisconnected(Exception):
    """The client left before its request was complete."""


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 above `max_bytes`, before a byte is read when Content-Length says so; 400 for a bad length.
        ClientDisconnected: The client left.
    """
    declared = headers.get(b"content-length")
    if declared is not None:
        if not declared.isdigit():
            raise ApiError(400, "Content-Length must be a whole number of bytes.")
        if int(declared[:20]) > max_bytes:
            raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks) if len(chunks) > 1 else chunk


def parse_object(body: bytes, content_type: bytes) -> dict[str, Any]:
    """The JSON object in `body`; ApiError 400 when the content type, the JSON or its shape is wrong."""
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        given = repr(media_type.decode("latin-1")[:100]) if media_type else "none"
        raise ApiError(
            400,
            f"The body must be JSON with the header 'Content-Type: application/json'; its content type is {given}.",
            code="unsupported_content_type",
        )
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not valid JSON: it is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"The body is not valid JSON: {error.msg} ({where}).") from None
    except ValueError as error:  # a number that is no JSON number, or has thousands of digits
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:100]}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.")
    # A container needs an opening bracket: most bodies have too few of them to be deep, so no walk.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH and _depth_exceeds(value, MAX_JSON_DEPTH):
        raise _too_deep()
    return value


def check_limits(fields: Mapping[str, Any], config: GatewayConfig) -> None:
    """Raise ApiError 400, naming the field and the limit, when a request asks for more than `config` allows."""
    if not isinstance(fields.get("stream"), bool | None):
        raise ApiError(400, "stream must be true or false.", param="stream")
    for name in OUTPUT_LIMIT_FIELDS:
        wanted = _whole_number(fields, name)
        if config.max_output_tokens is not None and wanted is not None and wanted > config.max_output_tokens:
            raise ApiError(
                400, f"{name} must be at most {config.max_output_tokens} on this server, not {wanted}.", param=name
            )
    n = _whole_number(fields, "n")
    n = 1 if n is None else n
    if n > config.max_n:
        raise ApiError(400, f"n must be at most {config.max_n} on this server, not {n}.", param="n")
    num_prompts = count_prompts(fields.get("prompt"))
    if num_prompts * max(n, 1) > config.max_sequences:
        raise ApiError(
            400,
            f"prompt times n must be at most {config.max_sequences} sequences on this server, not {num_prompts * n}.",
            param="prompt",
        )
    for name in sorted(config.denied_fields):
        if _lookup(fields, name) is not None:
            raise ApiError(400, f"{name} is not allowed on this server. Leave it out.", param=name)


def count_prompts(prompt: object) -> int:
    """Prompts in a text completion's `prompt`: a list of texts or of token lists holds several, a list of tokens
    is one."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def with_usage(body: bytes, fields: Mapping[str, Any], route: Route) -> bytes | None:
    """The body with `stream_options.include_usage` on, or None when there is nothing to change.

    Only a stream of OpenAI's chat or text completions has that option. The text is kept: the field goes in at the
    end, where it wins over an earlier one of the same name, here as in the app (json.loads in both).
    """
    options = fields.get("stream_options")
    if route.dialect != "openai" or not fields.get("stream") or not isinstance(options, dict | None):
        return None
    options = options or {}
    if options.get("include_usage"):
        return None
    # A continuous count was not asked for either: vLLM sends one only together with include_usage.
    changed = {**options, "include_usage": True, "continuous_usage_stats": False}
    return body.rstrip()[:-1] + b',"stream_options":' + json.dumps(changed).encode() + b"}"


def _whole_number(fields: Mapping[str, Any], name: str) -> int | None:
    """The field as an int. vLLM would also take "12", 12.0 and true: those would pass by the limits."""
    value = fields.get(name)
    if value is not None and type(value) is not int:
        raise ApiError(400, f"{name} must be a whole number.", param=name)
    return value


def _lookup(fields: Mapping[str, Any], dotted: str) -> object:
    value: object = fields
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)  # type: ignore[attr-defined]
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _too_deep() -> ApiError:
    return ApiError(400, f"The body nests arrays and objects more than {MAX_JSON_DEPTH} deep.")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than this server's limit of {max_bytes} bytes.", code="request_too_large")
