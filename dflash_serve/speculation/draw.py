"""A surface of step costs as a picture. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dflash_serve.speculation.estimate import expected_tokens
from dflash_serve.speculation.step_cost import StepCosts

SHOWN_RATES = tuple(step / 20 for step in range(21))


def draw(costs: StepCosts, choices: Sequence[int], paths: Sequence[Path]) -> None:
    """Left: what a step takes. Right: the K that pays best, by load and chance of acceptance."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dflash-serve"
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, (steps, best) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = plt.get_cmap("viridis")
    for index, count in enumerate(costs.draft_tokens):
        values = [1000 * costs.step_seconds(requests, count) for requests in costs.requests]
        shade = colours(index / max(len(costs.draft_tokens) - 1, 1))
        steps.plot(costs.requests, values, marker="o", markersize=4, color=shade, label=f"K = {count}")
    steps.set(xscale="log", yscale="log", xlabel="requests that run", ylabel="ms a step", title="What a step takes")
    steps.set_xticks(costs.requests, [str(n) for n in costs.requests])
    steps.minorticks_off()
    steps.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    steps.yaxis.set_major_formatter(ScalarFormatter())
    steps.yaxis.set_minor_formatter(NullFormatter())
    steps.legend(fontsize=8, frameon=False)
    steps.grid(alpha=0.3)
    steps.spines[["top", "right"]].set_visible(False)

    grid = [[_best(costs, requests, rate, choices) for requests in costs.requests] for rate in SHOWN_RATES]
    shown = [[list(choices).index(count) for count in row] for row in grid]
    best.imshow(shown, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=max(len(choices) - 1, 1))
    middle = (len(choices) - 1) / 2
    for y, row in enumerate(grid):
        for x, count in enumerate(row):
            dark = list(choices).index(count) < middle
            best.text(x, y, str(count), ha="center", va="center", fontsize=7, color="white" if dark else "black")
    best.set_xticks(range(len(costs.requests)), [str(n) for n in costs.requests])
    best.set_yticks(range(0, len(SHOWN_RATES), 4), [f"{rate:.1f}" for rate in SHOWN_RATES[::4]])
    best.set(xlabel="requests that run", ylabel="chance of acceptance at each position", title="K that pays best")
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _best(costs: StepCosts, requests: int, rate: float, choices: Sequence[int]) -> int:
    tokens = expected_tokens([rate] * choices[-1])
    return max(choices, key=lambda count: tokens[count] / costs.step_seconds(requests, count))
