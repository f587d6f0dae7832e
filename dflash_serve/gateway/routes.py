"""Which of the app's routes are open. All others do not exist, as far as a client can tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Dialect = Literal["openai", "responses", "anthropic"]
"""Shape of errors, usage and stream events. "responses" is OpenAI's too, with events of its own."""


@dataclass(frozen=True)
class Route:
    """One method of one path. `template` is also what logs and metrics call it."""

    method: str
    template: str
    dialect: Dialect = "openai"
    generates: bool = False
    """Runs the model: counts for admission, has usage."""
    json_body: bool = False
    public: bool = False
    """Open without a key."""
    prompt_field: str | None = None
    """Field that holds the prompt: the `param` of a context-length error."""


OTHER = Route("", "other")
"""Stands for what is not open."""

ROUTES = (
    Route("POST", "/v1/chat/completions", generates=True, json_body=True, prompt_field="messages"),
    Route("POST", "/v1/completions", generates=True, json_body=True, prompt_field="prompt"),
    # Only to create. vLLM keeps a response (GET, cancel, previous_response_id) in the memory of one replica, for
    # anyone who knows its id, for ever, and only with VLLM_ENABLE_RESPONSES_API_STORE=1.
    Route("POST", "/v1/responses", "responses", generates=True, json_body=True, prompt_field="input"),
    Route("POST", "/v1/messages", "anthropic", generates=True, json_body=True, prompt_field="messages"),
    Route("POST", "/v1/messages/count_tokens", "anthropic", json_body=True, prompt_field="messages"),
    Route("GET", "/v1/models"),
    Route("GET", "/health", public=True),
)

MODEL = Route("GET", "/v1/models/{id}")
MODEL_PREFIX = "/v1/models/"
"""Model ids may contain slashes, so everything below the prefix is an id."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RouteTable:
    """Finds the route of a request. Paths are compared exactly, after the server's percent-decoding: a trailing or
    doubled slash makes another path."""

    def __init__(self, extra_routes: Iterable[str] = ()) -> None:
        self._paths: dict[str, dict[str, Route]] = {}
        for route in (*ROUTES, *map(parse_route, extra_routes)):
            self._paths.setdefault(route.template, {})[route.method] = route

    def methods(self, path: str) -> dict[str, Route]:
        """Open routes of a path, by method; empty when the path is not open."""
        found = self._paths.get(path)
        if found is None and path.startswith(MODEL_PREFIX) and len(path) > len(MODEL_PREFIX):
            return {MODEL.method: MODEL}
        return found or {}


def parse_route(text: str) -> Route:
    """A route from "POST /tokenize"; ValueError when it is not of that form."""
    method, _, path = text.partition(" ")
    if method not in METHODS or not path.startswith("/") or "{" in path:
        raise ValueError(f'extra_routes: want "METHOD /path" without placeholders, not {text!r}')
    return Route(method, path)


def route_path(scope: Mapping[str, Any]) -> str:
    """Path below the mount point, by the rule of Starlette's router (starlette/_utils.py `get_route_path`): the
    gateway and the app must not see two different paths."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    if not root_path or not path.startswith(root_path):
        return path
    below = path[len(root_path) :]
    return below if below == "" or below.startswith("/") else path
