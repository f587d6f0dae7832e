"""The stand-in for Gemma-4's tokenizer: what weights that are dummies answer with is to be seen in a stream."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks.gemma4_shapes import CONTROL_TOKENS, write_tokenizer
from dflash_serve.bench.tasks import WORDS


def test_words_are_tokens_and_every_id_has_a_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 20000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 20000
    text = " ".join(WORDS)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < 2 * len(WORDS)
    # the first is what equal logits give, and 4 the drafter's mask
    assert {0, 4} <= {index for index, token in enumerate(CONTROL_TOKENS) if token in ("<pad>", "<mask>")}
    for index in (0, 4, *range(len(CONTROL_TOKENS), 20000, 997)):
        assert tokenizer.decode([index], skip_special_tokens=True)
    assert not tokenizer.decode([1, 2], skip_special_tokens=True)


def test_a_tiny_pair_has_bytes_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(CONTROL_TOKENS) + 256
