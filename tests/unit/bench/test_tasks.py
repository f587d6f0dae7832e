"""Prompts and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_serve.bench.tasks import HUB_TASKS, TaskError, load


def test_rows_of_the_hub_become_the_prompts_of_the_dflash_authors() -> None:
    boxed = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert HUB_TASKS["math500"].conversation({"problem": "1+1?"}) == ["1+1?" + boxed]
    assert HUB_TASKS["gsm8k"].conversation({"question": "2+2?"}) == ["2+2?" + boxed]
    (code,) = HUB_TASKS["humaneval"].conversation({"prompt": "def f():"})
    assert code.endswith("passes the tests:\n```python\ndef f():\n```")
    assert HUB_TASKS["mt_bench"].conversation({"prompt": ["one", "two"]}) == ["one", "two"]


def test_a_file_of_ones_own_and_random_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "hello"}\n{"turns": ["a", "b"]}\n')
    tasks = load([str(path), "random"], folder=None, samples=2, words=7)
    assert tasks["mine"] == [["hello"], ["a", "b"]]
    first, second = tasks["random"]
    assert len(first[0].split()) == 7
    assert first != second
    assert load(["random"], folder=None, samples=2, words=7)["random"] == tasks["random"], "the same in every run"


def test_the_bundled_sample_starts_with_one_of_each_kind() -> None:
    (sample,) = load(["sample"], folder=None, samples=3, words=1).values()
    assert len(sample) == 3
    assert "rolls" in sample[0][0]
    assert len(load(["sample"], folder=None, samples=100, words=1)["sample"]) == 12


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"text": "x"}', 'line 2: must be a JSON object with "prompt" or "turns"'), ('{"turns": "x"}', "list of texts")],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "hello"}\n' + line + "\n")
    with pytest.raises(TaskError, match=words):
        load([str(path)], folder=None, samples=9, words=1)


def test_unknown_tasks_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no task 'gsm9k'; there are math500"):
        load(["gsm9k"], folder=None, samples=1, words=1)
    with pytest.raises(TaskError, match=r"--tasks: mine\.jsonl: No such file"):
        load(["mine.jsonl"], folder=None, samples=1, words=1)
    with pytest.raises(TaskError, match=r"--data: there is no .*/gsm8k\.jsonl; put it there"):
        load(["gsm8k"], folder=tmp_path, samples=1, words=1)


def test_two_tasks_cannot_have_one_name(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    with pytest.raises(TaskError, match="would be called gsm8k, as another task is; rename it, or give its folder by"):
        load([str(path)], folder=None, samples=1, words=1)
