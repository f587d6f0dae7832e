"""The whole run as a user starts it, on a tiny random target with a tokenizer of its own."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dflash_serve.training.cli import UNFINISHED, main
from dflash_serve.training.data import BENCH_TASKS, Corpus

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456 "


@pytest.fixture
def target_folder(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    shutil.copytree(llama[1], folder)
    words = ["<pad>", "<eos>", "<user>", "<assistant>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(words[:4])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="Z", pad_token="<pad>", unk_token="<pad>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _denormals_as_before() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # `main` sets it for its process


def arguments(command: str, target: Path, out: Path, *more: str) -> list[str]:
    shape = ["--num-layers", "1", "--block-sizes", "4", "--target-layer-ids", "0,2", "--mask-token-id", "5"]
    rows = ["--row-length", "128", "--anchors-per-row", "16", "--rows-per-step", "2"]
    return [command, "--target", str(target), "--out", str(out), *shape, *rows, *more]


def test_run_leaves_everything_and_goes_on_where_it_left(target_folder: Path, tmp_path: Path) -> None:
    prompts, bench, out = tmp_path / "prompts.jsonl", tmp_path / "bench", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": LETTERS[i:], "source": "s"}) + "\n" for i in range(60)))
    bench.mkdir()
    for task in BENCH_TASKS:
        item = {"turns": ["abc", "de"]} if task == "mt_bench" else {"prompt": task}
        (bench / f"{task}.jsonl").write_text(json.dumps(item) + "\n")
    more = ["--prompts", str(prompts), "--bench", str(bench), "--max-new-tokens", "20", "--max-steps", "8"]
    run = arguments("run", target_folder, out, *more)

    assert main([*run, "--leave-after", "0"]) == UNFINISHED
    assert not (out / "acceptance.json").exists()
    answered = (out / "answers.npz").stat().st_mtime_ns
    assert main(run) == 0
    assert (out / "answers.npz").stat().st_mtime_ns == answered

    written = {path.name for path in out.iterdir()}
    assert {"training.png", "training.svg", "acceptance.txt", "phases.json", "drafter", "train.jsonl"} <= written
    result = json.loads((out / "acceptance.json").read_text())
    assert set(result["bench"]) == {*BENCH_TASKS, "all"}
    assert result["bench"]["all"]["3"]["acceptance_length"] >= 1
    corpus = Corpus.load(out / "bench_answers.npz")
    assert len(corpus) == 6  # both turns of mt_bench
    first, second = corpus.prompt(4).tolist(), corpus.prompt(5).tolist()
    assert second[: len(first)] == first, "the second turn has the first as its history"

    simulate = ["simulate", "--target", str(target_folder), "--drafter", str(out / "drafter")]
    rows = ["--row-length", "128", "--anchors-per-row", "16", "--rows-per-step", "2"]
    again = tmp_path / "again.json"
    assert main([*simulate, "--answers", str(out / "bench_answers.npz"), "--json", str(again), *rows]) == 0
    assert json.loads(again.read_text()) == result["bench"]


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompts", "none.jsonl", "--bench", "none"]
    assert main(arguments("run", tmp_path, tmp_path / "out", *given)) == 2
    assert capsys.readouterr().err == f"error: target: no config.json in {tmp_path}; give a Hugging Face model folder\n"
