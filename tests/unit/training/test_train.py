import json
from pathlib import Path

import pytest
import torch

from dflash_serve.training.data import Corpus
from dflash_serve.training.drafter import DFlashDrafter
from dflash_serve.training.plot import plot
from dflash_serve.training.target import Target
from dflash_serve.training.train import Trainer, TrainReport, TrainSettings, learning_rate_scale, train
from tests.unit.training.conftest import CPU


def counting_corpus() -> Corpus:
    """Answers that count up, modulo 8, from the prompt's last token: learnable in seconds."""
    prompts = [[60, 61, i % 8] for i in range(60)]
    answers = [[(i + k) % 8 for k in range(1, 20)] for i in range(60)]
    return Corpus.build(prompts, answers, [True] * 60, ["count"] * 60, 64)


SETTINGS = TrainSettings(
    seconds=600.0,
    max_steps=120,
    num_layers=1,
    block_sizes=(4, 3),
    target_layer_ids=(0, 2),
    row_length=64,
    anchors_per_row=24,
    rows_per_step=4,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def trained(target: Target, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, TrainReport, Path]:
    folder = tmp_path_factory.mktemp("trained")
    trainer = Trainer(target, counting_corpus(), SETTINGS)
    return trainer, train(trainer, folder), folder


def test_training_learns_and_writes_its_files(trained: tuple[Trainer, TrainReport, Path], tmp_path: Path) -> None:
    trainer, report, folder = trained
    assert report.finished
    assert report.steps == 120
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 120
    assert lines[-1]["learning_rate"] < 1e-4
    assert lines[-1]["validation_acceptance_length"]["2"] > 2.4  # of 3
    assert lines[-1]["validation_acceptance_length"]["3"] > 3.0  # of 4
    saved = DFlashDrafter.load(folder / "drafter", CPU)
    assert torch.equal(saved.fc.weight, trainer.drafter.fc.weight.bfloat16().float())
    for path in plot(folder / "train.jsonl", tmp_path):
        assert path.stat().st_size > 5000


def test_a_run_that_left_early_goes_on(target: Target, tmp_path: Path) -> None:
    corpus = counting_corpus()
    report = train(Trainer(target, corpus, SETTINGS), tmp_path, leave_after_seconds=0.3)
    assert not report.finished
    again = Trainer(target, corpus, SETTINGS)
    last = train(again, tmp_path)
    assert last.finished
    assert report.steps + last.steps == again.step == 120
    other = Trainer(target, corpus, TrainSettings(**(vars(SETTINGS) | {"learning_rate": 1e-3})))
    with pytest.raises(ValueError, match=r"learning_rate: not what .* was trained with"):
        train(other, tmp_path)


def test_steps_are_the_same_whenever_they_are_taken(target: Target, tmp_path: Path) -> None:
    """Rows, anchors and weights depend on seed and step alone; with a rate by steps, so does the result."""
    settings = TrainSettings(**(vars(SETTINGS) | {"max_steps": 4, "seconds": 1e9}))
    once, twice = (Trainer(target, counting_corpus(), settings) for _ in range(2))
    train(once, tmp_path / "a")
    train(twice, tmp_path / "b")
    torch.testing.assert_close(once.drafter.fc.weight, twice.drafter.fc.weight, rtol=0, atol=1e-6)


def test_training_begins_with_given_weights(
    target: Target, trained: tuple[Trainer, TrainReport, Path], tmp_path: Path
) -> None:
    further = TrainSettings(**(vars(SETTINGS) | {"begin_with": str(trained[2] / "drafter"), "max_steps": 1}))
    train(Trainer(target, counting_corpus(), further), tmp_path / "second")
    line = json.loads((tmp_path / "second" / "train.jsonl").read_text().splitlines()[-1])
    assert line["validation_acceptance_length"]["3"] > 3.0  # of 4, after a single step


def test_learning_rate_schedule() -> None:
    assert learning_rate_scale(0.0) == 0
    assert learning_rate_scale(0.02) == pytest.approx(0.5)
    assert learning_rate_scale(0.04) == pytest.approx(1.0)
    assert learning_rate_scale(0.52) == pytest.approx(0.5)
    assert learning_rate_scale(1.0) == pytest.approx(0.0)
    assert learning_rate_scale(1.3) == pytest.approx(0.0)
