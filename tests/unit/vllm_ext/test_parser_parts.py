"""What vLLM's parsers are made of, once; and that vLLM still makes it for each request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.parser.abstract_parser import DelegatingParser
from vllm.parser.engine import streaming_parser_engine as parsers
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
    for name in ("parse_delta", "count_reasoning_tokens"):
        monkeypatch.setattr(DelegatingParser, name, getattr(DelegatingParser, name))


@pytest.fixture
def installed(vllms_own: None) -> None:
    parser_parts.install(count_once=True)


def test_vllm_still_needs_it(tokenizer: Any) -> None:
    first, second = (parsers._build_drop_info(gemma4_config(), tokenizer) for _ in range(2))
    assert first is not None
    assert first is not second, "vLLM keeps them (vllm-project/vllm#58172): remove parser_parts"


@pytest.mark.usefixtures("installed")
def test_the_parsers_of_two_requests_share_what_does_not_change(tokenizer: Any) -> None:
    parser_parts.install(count_once=True)
    one, other = (parsers._build_drop_info(gemma4_config(), tokenizer) for _ in range(2))
    assert one is not None
    assert one is other
    before = dict(one.extra_token_ids)
    assert [answer(tokenizer) for _ in range(2)] == [("it adds", "4")] * 2
    assert one.extra_token_ids == before


@pytest.mark.usefixtures("vllms_own")
def test_it_changes_no_answer(tokenizer: Any) -> None:
    expected = answer(tokenizer)
    assert expected == ("it adds", "4")
    parser_parts.install(count_once=True)
    assert answer(tokenizer) == expected


ANSWERS = {
    "no reasoning": "just 4",
    "reasoning": "<|channel>thought\nit adds<channel|>4",
    "reasoning that does not end": "<|channel>thought\nit",
    "reasoning without its beginning": "thought\nit adds 2 and 2",
    "a tool": "<|tool_call>call:add{a:1}<tool_call|>",
    "an end alone": "4<channel|>5",
}


@pytest.mark.usefixtures("vllms_own")
@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_stream_ends_with_the_count_that_vllm_has(tokenizer: Any, text: str, thinking: bool) -> None:
    own = counts(tokenizer, text, thinking=thinking)
    parser_parts.install(count_once=True)
    ours = counts(tokenizer, text, thinking=thinking)
    assert ours[-1] == own[-1]
    assert set(ours[:-1]) == {0}
    every = {"include_usage": True, "continuous_usage_stats": True}
    assert counts(tokenizer, text, thinking=thinking, stream_options=every) == own


@pytest.mark.usefixtures("vllms_own")
def test_reasoning_is_counted_at_all(tokenizer: Any) -> None:
    parser_parts.install(count_once=True)
    assert counts(tokenizer, ANSWERS["reasoning"], thinking=True)[-1] > 5
    assert counts(tokenizer, ANSWERS["no reasoning"], thinking=False)[-1] == 0


@pytest.mark.usefixtures("vllms_own")
def test_an_answer_is_read_once_for_its_count(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    parse = Gemma4Parser._single_pass_parse

    def counted(self: Any, text: str, token_ids: Any, *rest: Any) -> Any:
        read.append(len(token_ids))
        return parse(self, text, token_ids, *rest)

    monkeypatch.setattr(Gemma4Parser, "_single_pass_parse", counted)
    counts(tokenizer, "just 4", thinking=False)
    assert read == [1, 2, 3, 4, 5, 6], "vLLM reads it once (vllm-project/vllm#56067): remove count_once"
    read.clear()
    parser_parts.install(count_once=True)
    counts(tokenizer, "just 4", thinking=False)
    assert read == [6]


@pytest.mark.usefixtures("vllms_own")
def test_where_every_event_carries_the_count_it_is_vllms(tokenizer: Any) -> None:
    own = counts(tokenizer, ANSWERS["reasoning"], thinking=True)
    parser_parts.install(count_once=False)
    assert counts(tokenizer, ANSWERS["reasoning"], thinking=True) == own


def answer(tokenizer: Any) -> tuple[str | None, str | None]:
    """Reasoning and content that Gemma-4's parser reads out of a whole answer."""
    text = "<|channel>thought\nit adds<channel|><unk>4"
    parser: Any = Gemma4Parser(tokenizer, chat_template_kwargs={"enable_thinking": True})
    ids = tokenizer.encode(text, add_special_tokens=False)
    reasoning, content, _ = parser.parse(text, chat_request(), model_output_token_ids=ids)
    return reasoning, content


def counts(tokenizer: Any, text: str, *, thinking: bool, **fields: Any) -> list[int]:
    """Reasoning tokens as vLLM's chat stream counts them, token by token."""
    request = chat_request(**fields)
    parser_class = ParserManager.get_parser("gemma4", "gemma4", True)
    assert parser_class is not None
    parser: Any = parser_class(tokenizer, None, chat_template_kwargs={"enable_thinking": thinking})
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = tokenizer.encode("<bos><|turn>user\n2 + 2?<turn|>\n<|turn>model\n", add_special_tokens=False)
    found = []
    for end in range(1, len(ids) + 1):
        new = [ids[end - 1]]
        parser.parse_delta(tokenizer.decode(new), new, request, prompt_token_ids=prompt, finished=end == len(ids))
        found.append(parser.count_reasoning_tokens(tuple(ids[:end])))
    return found


def chat_request(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "2 + 2?"}]
    return ChatCompletionRequest.model_validate({"messages": messages, "stream": True, **fields})


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
