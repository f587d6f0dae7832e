"""Errors as a client sees them, in the shape of the API that it speaks.

OpenAI: `{"error": {"message", "type", "param", "code"}}` (platform.openai.com/docs/guides/error-codes).
Anthropic: `{"type": "error", "error": {"type", "message"}, "request_id"}` (docs.anthropic.com/en/api/errors).
"""

from __future__ import annotations

import ast
import json
import re
from http import HTTPStatus
from typing import Any

from dflash_serve.gateway.routes import MODEL, Dialect, Route

MAX_MESSAGE_CHARS = 1000
"""vLLM repeats the client's input in some messages; a client needs no more than this of it."""

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

CONTEXT_TOO_LONG = ("maximum context length", "maximum model length", "max_model_len")
"""vllm/renderers/params.py, vllm/v1/engine/input_processor.py, vllm/entrypoints/openai/responses/serving.py."""

ENGINE_DEAD = "EngineCore"
"""In the message of vLLM's EngineDeadError (vllm/v1/engine/exceptions.py), which arrives as a 500."""

_PYDANTIC_MESSAGE = re.compile(r"""'msg': ('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_VLLM_SUFFIX = re.compile(r"\s*\(parameter=.*\)$", re.DOTALL)


class ApiError(Exception):
    """A refusal or failure with all that a client is told. `headers` go out with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = headers

    def payload(self, dialect: Dialect, request_id: str) -> dict[str, Any]:
        """The JSON object of the error, for a response body or a stream event."""
        if dialect == "anthropic":
            kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self, dialect: Dialect, request_id: str) -> bytes:
        return json.dumps(self.payload(dialect, request_id)).encode()

    def event(self, dialect: Dialect, request_id: str) -> bytes:
        """As a server-sent event, for a stream that has begun."""
        payload = self.payload(dialect, request_id)
        if dialect == "openai":
            return b"data: " + json.dumps(payload).encode() + b"\n\n"
        if dialect == "responses":
            # The event's documented fields are flat; OpenAI's SDK raises on a nested "error" only.
            payload = {"type": "error", "code": self.code, "message": self.message, "param": self.param, **payload}
        return b"event: error\ndata: " + json.dumps(payload).encode() + b"\n\n"


def retry_headers(retry_after_seconds: int) -> tuple[tuple[bytes, bytes], ...]:
    """Tell a client, and OpenAI's SDK by name, to come back."""
    return ((b"retry-after", str(retry_after_seconds).encode()), (b"x-should-retry", b"true"))


def internal_error(request_id: str) -> ApiError:
    return ApiError(
        500, f"The server failed to process the request. Its log has the details under request id {request_id}."
    )


def overloaded(retry_after_seconds: int) -> ApiError:
    return ApiError(
        429,
        "This replica is at its limit of concurrent requests. Please retry after a short wait.",
        type="requests",
        code="rate_limit_exceeded",
        headers=retry_headers(retry_after_seconds),
    )


def unavailable(message: str, retry_after_seconds: int) -> ApiError:
    return ApiError(503, message, code="service_unavailable", headers=retry_headers(retry_after_seconds))


def engine_stopped(retry_after_seconds: int) -> ApiError:
    return unavailable("The model engine has stopped and is being replaced. Please retry.", retry_after_seconds)


def normalise(
    status: int, body: bytes, *, route: Route, request_id: str, model_id: str, retry_after_seconds: int
) -> ApiError:
    """Turn an error that the app made into one for the client.

    Args:
        status: HTTP status that the app gave, 400 or above.
        body: What it sent, in any of vLLM's, FastAPI's or Starlette's shapes; may be cut or empty.
    """
    message, param = _read(body)
    if status >= 500 and ENGINE_DEAD in message:
        return engine_stopped(retry_after_seconds)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return unavailable("The model is busy or not ready. Please retry after a short wait.", retry_after_seconds)
    if status == HTTPStatus.NOT_IMPLEMENTED:  # vLLM's way to say "this model cannot"; a 5xx would be retried
        status = HTTPStatus.BAD_REQUEST
    if status >= 500:
        return internal_error(request_id)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return overloaded(retry_after_seconds)

    message = _tidy(message, param) or _phrase(status)
    if param is not None:
        param = param.removeprefix("body.")
    about_model = param == "model" or "model" in message.lower()
    if status == HTTPStatus.NOT_FOUND and (about_model or route is MODEL):
        message = message.rstrip(".") if about_model else "There is no such model"
        return ApiError(404, f"{message}. This server serves `{model_id}`.", param="model", code="model_not_found")
    if any(sign in message for sign in CONTEXT_TOO_LONG):
        return ApiError(400, message, param=route.prompt_field, code="context_length_exceeded")
    return ApiError(status, message, param=None if param == "body" else param)


def _read(body: bytes) -> tuple[str, str | None]:
    """Message and parameter out of an error body; an unreadable one gives an empty message."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace").strip()
        return ("" if "<" in text or "\n" in text else text), None  # no HTML, no stack trace
    if not isinstance(data, dict):
        return "", None
    error = data.get("error", data.get("detail"))
    if isinstance(error, str):
        return error, None
    if not isinstance(error, dict):
        return "", None
    message, param = error.get("message"), error.get("param")
    return message if isinstance(message, str) else "", param if isinstance(param, str) else None


def _tidy(message: str, param: str | None) -> str:
    """Without pydantic's dump of the whole input and without vLLM's repetition of the parameter."""
    if re.match(r"\d+ validation errors?:", message):
        found = _PYDANTIC_MESSAGE.search(message)
        if found is None:
            return "The request is not valid."
        reason = str(ast.literal_eval(found[1])).removeprefix("Value error, ")
        where = (param or "").removeprefix("body.").removeprefix("body")
        message = f"{where}: {reason}" if where else reason
    return _VLLM_SUFFIX.sub("", message)[:MAX_MESSAGE_CHARS]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase + "."
    except ValueError:
        return "The request failed."
