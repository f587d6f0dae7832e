from pathlib import Path

import numpy as np
import pytest

from dflash_serve.training.data import Corpus, Prompt, pack_rows, read_prompts, split_held_out


def small_corpus() -> Corpus:
    return Corpus.build(
        prompts=[[1, 2], [3], [4, 5, 6]],
        answers=[[10, 11, 12], [13, 14], [15]],
        finished=[True, False, True],
        tasks=["a", "b", "a"],
        vocab_size=49152,
    )


def test_packing() -> None:
    rows = pack_rows(small_corpus(), [2, 0, 1], row_length=9, multiple_of=2)
    assert rows.tokens.tolist() == [[4, 5, 6, 15, 1, 2, 10, 11, 12], [3, 13, 14, 0, 0, 0, 0, 0, 0]]
    assert rows.document_start.tolist() == [[0] * 4 + [4] * 5, [0] * 3 + [3] * 6]
    assert rows.document_end.tolist() == [[4] * 4 + [9] * 5, [3] * 3 + [9] * 6]
    assert rows.is_answer.astype(int).tolist() == [[0, 0, 0, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert rows.document.tolist() == [[2] * 4 + [0] * 5, [1] * 3 + [-1] * 6]


def test_a_document_is_never_split_over_rows_and_rows_are_padded_to_the_multiple() -> None:
    rows = pack_rows(small_corpus(), [0, 1], row_length=6, multiple_of=4)
    assert rows.tokens.tolist() == [[1, 2, 10, 11, 12, 0], [3, 13, 14, 0, 0, 0], [0] * 6, [0] * 6]
    assert not rows.is_answer[2:].any()


def test_packing_many_random_documents_keeps_every_token() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 99, size=n).tolist() for n in rng.integers(1, 20, size=300)]
    answers = [rng.integers(1, 99, size=n).tolist() for n in rng.integers(1, 40, size=300)]
    corpus = Corpus.build(prompts, answers, [True] * 300, ["t"] * 300, 100)
    order = rng.permutation(300)
    rows = pack_rows(corpus, order, row_length=64)
    packed = rows.tokens[rows.document >= 0].tolist()
    assert packed == [token for i in order for token in prompts[i] + answers[i]]
    assert rows.tokens[rows.is_answer].tolist() == [token for i in order for token in answers[i]]


def test_corpus_round_trip(tmp_path: Path) -> None:
    corpus = small_corpus()
    corpus.save(tmp_path / "answers.npz")
    again = Corpus.load(tmp_path / "answers.npz")
    assert again.tokens.dtype == np.uint16
    for name in ("tokens", "offsets", "prompt_lengths", "finished", "tasks"):
        assert getattr(again, name).tolist() == getattr(corpus, name).tolist()
    assert again.prompt(2).tolist() == [4, 5, 6]
    assert again.answer(0).tolist() == [10, 11, 12]


def test_split_is_stable_and_disjoint() -> None:
    train, held_out = split_held_out(1000, seed=7)
    assert len(held_out) == 20
    assert sorted([*train, *held_out]) == list(range(1000))
    assert split_held_out(1000, seed=7)[1].tolist() == held_out.tolist()


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mt_bench.jsonl"
    path.write_text('{"prompt": "a", "source": "s"}\n{"turns": ["b", "c"]}\n')
    assert read_prompts(path) == [Prompt("s", ("a",)), Prompt("mt_bench", ("b", "c"))]
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r'line 1 .* has neither "prompt" nor "turns"'):
        read_prompts(path)


def test_a_line_separator_inside_a_prompt_is_no_end_of_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n{"prompt": "three"}\n', encoding="utf-8")
    assert [prompt.turns for prompt in read_prompts(path)] == [("one\u2028two",), ("three",)]
