"""Curves of a training run: loss, accuracy by place in the block, simulated acceptance length."""

import json
from pathlib import Path
from typing import Any

PLACES = (1, 3, 7, 15)
"""Places in the block whose accuracy is drawn."""


def plot(log_path: Path, out: Path) -> list[Path]:
    """Draw `train.jsonl` into out/training.png and out/training.svg; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not log_path.is_file():
        raise FileNotFoundError(f"plot: {log_path} does not exist; train first")
    lines: list[dict[str, Any]] = [json.loads(line) for line in log_path.read_text().splitlines()]
    if not lines:
        raise ValueError(f"plot: {log_path} is empty; train first")
    seconds = [line["seconds"] for line in lines]
    figure, (loss, accuracy, accepted) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")

    loss.plot(seconds, [line["loss"] for line in lines], color="tab:blue")
    loss.set(title="Training loss", ylabel="weighted cross entropy")

    for place in PLACES:
        if place <= len(lines[0]["accuracy"]):
            accuracy.plot(seconds, [line["accuracy"][place - 1] for line in lines], label=f"draft token {place}")
    accuracy.set(title="Accuracy on training answers", ylabel="share of tokens right", ylim=(0, 1))
    accuracy.legend()

    validated = [line for line in lines if "validation_acceptance_length" in line]
    for k in validated[0]["validation_acceptance_length"] if validated else ():
        values = [line["validation_acceptance_length"][k] for line in validated]
        accepted.plot([line["seconds"] for line in validated], values, marker="o", markersize=3, label=f"K = {k}")
    accepted.set(title="Simulated acceptance length, held out", ylabel="tokens per verification")
    if validated:
        accepted.legend()

    for axis in (loss, accuracy, accepted):
        axis.set_xlabel("training time [s]")
        axis.grid(alpha=0.3)
    paths = [out / "training.png", out / "training.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths
