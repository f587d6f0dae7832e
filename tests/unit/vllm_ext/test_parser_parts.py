"""What vLLM's parsers are made of, once; and that vLLM still makes it for each request."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.engine import streaming_parser_engine as parsers
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter as Adapter
from vllm.parser.engine.parser_engine_config import ParserState
from vllm.parser.engine.registered_adapters import Gemma4ParserReasoningAdapter
from vllm.parser.gemma4 import Gemma4Parser, gemma4_config

from benchmarks.gemma4_shapes import write_tokenizer
from dflash_serve.vllm_ext import parser_parts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load(folder)


def load(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture
def vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed in a test does not stay."""
    monkeypatch.setattr(parsers, "_build_drop_info", parsers._build_drop_info)
    monkeypatch.setattr(Adapter, "count_reasoning_tokens", Adapter.count_reasoning_tokens)


@pytest.fixture
def installed(vllms_own: None) -> None:
    parser_parts.install()


def test_vllm_still_needs_it(tokenizer: Any) -> None:
    first, second = (parsers._build_drop_info(gemma4_config(), tokenizer) for _ in range(2))
    assert first is not None
    assert first is not second, "vLLM keeps them (vllm-project/vllm#58172): remove parser_parts"


@pytest.mark.usefixtures("installed")
def test_the_parsers_of_two_requests_share_what_does_not_change(tokenizer: Any) -> None:
    parser_parts.install()
    one, other = (parsers._build_drop_info(gemma4_config(), tokenizer) for _ in range(2))
    assert one is not None
    assert one is other
    before = dict(one.extra_token_ids)
    assert [answer(tokenizer) for _ in range(2)] == [answer(tokenizer)] * 2
    assert one.extra_token_ids == before


@pytest.mark.usefixtures("vllms_own")
def test_it_changes_no_answer(tokenizer: Any) -> None:
    expected = answer(tokenizer)
    assert expected == ("it adds", "4")
    parser_parts.install()
    assert answer(tokenizer) == expected


ANSWERS = {
    "no reasoning": ("just 4", 0),
    "reasoning": ("<|channel>thought\nit adds<channel|>4", 15),
    "reasoning that does not end": ("<|channel>thought\nit", 10),
    "a tool": ("<|tool_call>call:add{a:1}<tool_call|>", 0),
    "an end alone": ("4<channel|>5", 1),
    "text that looks like the beginning": ("< |channel>thought\nno<channel|>4", 0),
    "nothing": ("", 0),
}


@pytest.mark.usefixtures("vllms_own")
@pytest.mark.parametrize("name", ANSWERS)
def test_it_counts_the_reasoning_tokens_that_vllm_counts(tokenizer: Any, name: str) -> None:
    text, tokens = ANSWERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if name.startswith("text"):
        # the same characters, in tokens that are none of its own
        ids = [token for letter in text.replace("< |", "<|") for token in tokenizer.encode(letter)]
        assert tokenizer.decode(ids).startswith("<|channel>")
    own = [count(tokenizer, ids[:end]) for end in range(len(ids) + 1)]
    parser_parts.install()
    assert [count(tokenizer, ids[:end]) for end in range(len(ids) + 1)] == own
    assert own[-1] == tokens


@pytest.mark.usefixtures("vllms_own")
def test_an_answer_without_reasoning_is_not_read_again_with_each_event(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    parse = Gemma4Parser._single_pass_parse

    def counted(self: Any, text: str, token_ids: Any, *rest: Any) -> Any:
        read.append(len(token_ids))
        return parse(self, text, token_ids, *rest)

    monkeypatch.setattr(Gemma4Parser, "_single_pass_parse", counted)
    ids = tokenizer.encode("just 4", add_special_tokens=False)
    count(tokenizer, ids)
    assert read == [len(ids)], "vLLM reads it no more (vllm-project/vllm#56067)"
    parser_parts.install()
    count(tokenizer, ids)
    assert read == [len(ids)]


def test_reasoning_that_may_begin_otherwise_is_counted_as_vllm_does() -> None:
    assert parser_parts.begins_by_token(gemma4_config())
    config = gemma4_config()
    assert not parser_parts.begins_by_token(dataclasses.replace(config, initial_state=ParserState.REASONING))
    assert not parser_parts.begins_by_token(dataclasses.replace(config, token_id_terminals={}))
    more = {(ParserState.CONTENT, "CALL_PREFIX"): config.transitions[ParserState.CONTENT, "THINK_START"]}
    assert not parser_parts.begins_by_token(dataclasses.replace(config, transitions=config.transitions | more))


def count(tokenizer: Any, ids: list[int]) -> int:
    """As vLLM counts them for an answer, or a stream whose prompt says that there is no reasoning."""
    adapter = Gemma4ParserReasoningAdapter(tokenizer)
    found: int = adapter.count_reasoning_tokens(tuple(ids))
    return found


def answer(tokenizer: Any) -> tuple[str | None, str | None]:
    """Reasoning and content that Gemma-4's parser reads out of a whole answer."""
    text = "<|channel>thought\nit adds<channel|><unk>4"
    parser: Any = Gemma4Parser(tokenizer, chat_template_kwargs={"enable_thinking": True})
    request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "2 + 2?"}]})
    ids = tokenizer.encode(text, add_special_tokens=False)
    reasoning, content, _ = parser.parse(text, request, model_output_token_ids=ids)
    return reasoning, content


@pytest.mark.usefixtures("installed")
def test_another_tokenizer_has_its_own(tokenizer: Any, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    other = load(tmp_path)
    ours = parsers._build_drop_info(gemma4_config(), tokenizer)
    assert parsers._build_drop_info(gemma4_config(), other) is not ours


def test_few_are_kept() -> None:
    built: list[object] = []

    def made(config: object, _: object) -> object:
        built.append(config)
        return config

    build = parser_parts.once(made)
    configs = [object() for _ in range(parser_parts.MOST_KEPT + 1)]
    for config in configs:
        assert build(config, None) is config
        assert build(config, None) is config
    assert built == configs
    assert build(configs[0], None) is configs[0]
    assert len(built) == len(configs) + 1
