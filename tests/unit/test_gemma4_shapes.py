"""The stand-in for Gemma-4's tokenizer: what weights that are dummies answer with is to be seen in a stream."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks.gemma4_shapes import CONTROL_TOKENS, write_tokenizer
from dflash_serve.bench.tasks import WORDS


def test_words_are_tokens_and_what_dummies_answer_has_a_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 20000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 20000
    text = " ".join(WORDS)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < 2 * len(WORDS)
    texts = tokenizer.batch_decode([[index] for index in range(20000)], skip_special_tokens=True)
    without = {index for index, text in enumerate(texts) if not text}
    # equal logits give the first, 4 is the drafter's <mask>
    assert without == set(range(len(CONTROL_TOKENS))) - {0, 4}
    assert (CONTROL_TOKENS[0], CONTROL_TOKENS[4]) == ("<pad>", "<mask>")
    # an answer that comes back as history is as many tokens as it was
    for answered in (0, 4):
        assert tokenizer(tokenizer.decode([answered] * 50))["input_ids"] == [answered] * 50
        assert texts[answered].strip().isalpha()
    # so it is whatever a drafter without weights drafts
    ids = random.Random(0).choices(range(len(CONTROL_TOKENS), 20000), k=2000)
    assert len(tokenizer(tokenizer.decode(ids))["input_ids"]) == pytest.approx(len(ids), rel=0.1)
    meaningless = list(range(15000, 20000))
    assert tokenizer(tokenizer.decode(meaningless))["input_ids"] == meaningless
    # a stream withholds the bytes of a longer character until it is whole: those are few
    assert sum(text.endswith("\ufffd") for text in texts) < 200


def test_a_tiny_pair_has_bytes_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(CONTROL_TOKENS) + 256
