"""What vLLM's reasoning and tool-call parsers do again and again on the event loop that all requests share, done once.

- vLLM 0.29 makes three parsers a request with `--reasoning-parser gemma4 --tool-call-parser gemma4`, and each compiles
  an expression for every special token of the tokenizer (vllm-project/vllm#58145). Can go with vllm-project/vllm#58172.
- With each event of a stream it counts reasoning tokens anew: an answer without reasoning is decoded and parsed from
  its beginning, so that a stream takes time by the square of its length. Can go with vllm-project/vllm#56067.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.parser.engine.parser_engine import ParserEngine
    from vllm.parser.engine.parser_engine_config import ParserEngineConfig

MOST_KEPT = 16
"""Pairs of a parser's configuration and a tokenizer; a server has a few."""
BEGIN = "THINK_START"


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


def begins_by_token(config: ParserEngineConfig) -> bool:
    """Whether reasoning can begin with one token alone: text that looks like it does not count beside tokens
    (`StreamingParserEngine._process_lex_tokens`)."""
    from vllm.parser.engine.parser_engine_config import ParserState

    begun_by = {
        terminal
        for (state, terminal), transition in config.transitions.items()
        if transition.next_state is ParserState.REASONING and state is not ParserState.REASONING
    }
    return config.initial_state is ParserState.CONTENT and begun_by == {BEGIN} and BEGIN in config.token_id_terminals


def has_no_reasoning(engine: ParserEngine, token_ids: Sequence[int]) -> bool:
    """Whether that can be told of an answer without parsing it. (vLLM counts a token that ends nothing as one.)"""
    begin, end = engine._reasoning_start_token_id, engine._reasoning_end_token_id
    known = begin is not None and begins_by_token(engine.parser_engine_config)
    return known and begin not in token_ids and end not in token_ids


def install() -> None:
    """In the process that has the API. Raises ImportError or AttributeError where vLLM's names have moved."""
    from vllm.parser.engine import streaming_parser_engine as parsers
    from vllm.parser.engine.adapters import ParserEngineReasoningAdapter as Adapter

    build, count = parsers._build_drop_info, Adapter.count_reasoning_tokens
    if hasattr(build, "dflash_serve"):
        return

    def count_reasoning_tokens(self: Any, token_ids: Sequence[int]) -> int:
        # as vLLM has it: what a stream's reasoning was counted as while it passed
        if not self._streaming_count_valid and has_no_reasoning(self._parser_engine, token_ids):
            return 0
        return count(self, token_ids)

    built = once(build)
    built.dflash_serve = True  # type: ignore[attr-defined]
    parsers._build_drop_info = built  # type: ignore[assignment]
    Adapter.count_reasoning_tokens = count_reasoning_tokens  # type: ignore[method-assign]
