"""What vLLM's reasoning and tool-call parsers do again and again on the event loop that all requests share, done once.

- vLLM 0.29 makes three parsers a request with `--reasoning-parser gemma4 --tool-call-parser gemma4`, and each compiles
  an expression for every special token of the tokenizer (vllm-project/vllm#58145). Can go with vllm-project/vllm#58172.
- With each event of a chat stream it counts reasoning tokens anew: an answer without reasoning is decoded and parsed
  from its beginning, so that a stream takes time by the square of its length. Can go with vllm-project/vllm#56067.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MOST_KEPT = 16
"""Pairs of a parser's configuration and a tokenizer; a server has a few."""
MARK = "_dflash_serve"


def once(build: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`build`, which gives something that nobody changes, called once for each pair of objects."""
    kept: dict[tuple[int, int], tuple[Any, Any, Any]] = {}

    def built(config: Any, tokenizer: Any) -> Any:
        key = (id(config), id(tokenizer))
        if key not in kept:
            if len(kept) >= MOST_KEPT:
                kept.clear()
            # with what it was made of, so that no other object gets those ids
            kept[key] = (config, tokenizer, build(config, tokenizer))
        return kept[key][2]

    return built


def install(*, count_once: bool) -> None:
    """In the process that has the API. Raises ImportError or AttributeError where vLLM's names have moved.

    Args:
        count_once: Count a chat stream's reasoning tokens with its last event, unless its request wants them with each.
            Not with vLLM's `enable_force_include_usage`, where every event carries them.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.utils.api_utils import should_include_usage
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.parser.engine import streaming_parser_engine as parsers

    build = parsers._build_drop_info
    parse, count = DelegatingParser.parse_delta, DelegatingParser.count_reasoning_tokens
    if hasattr(build, MARK):
        return
    built = once(build)
    setattr(built, MARK, True)
    parsers._build_drop_info = built  # type: ignore[assignment]
    if not count_once:
        return

    def parse_delta(
        self: Any, delta_text: Any, delta_token_ids: Any, request: Any, prompt_token_ids: Any = None, *, finished: bool
    ) -> Any:
        unread = not finished and isinstance(request, ChatCompletionRequest)
        if unread:
            _, with_each_event = should_include_usage(request.stream_options, False)
            unread = not with_each_event
        setattr(self, MARK, unread)
        return parse(self, delta_text, delta_token_ids, request, prompt_token_ids, finished=finished)

    def count_reasoning_tokens(self: Any, token_ids: Sequence[int]) -> int:
        # with an event of a chat stream that is not its last nobody reads it
        return 0 if getattr(self, MARK, False) else count(self, token_ids)

    DelegatingParser.parse_delta = parse_delta  # type: ignore[method-assign]
    DelegatingParser.count_reasoning_tokens = count_reasoning_tokens  # type: ignore[method-assign]
