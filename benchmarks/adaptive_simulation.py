"""What the choice of draft lengths loses against the best, on recorded step costs.

    python -m benchmarks.adaptive_simulation

No engine runs: steps take what the surface says (see `about` in it), drafts are accepted with the chances that give the
model card's acceptance lengths at 15 draft tokens, the same at each position. Each figure is a regret: the share of the
tokens that the best K of each moment would have given and the chosen ones did not. Loads hold for 20 s, of which the
first 3 s are left out (how fast it gets there is shown apart).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from dflash_serve.bench.card import acceptance_length
from dflash_serve.speculation.controller import DraftLengthController
from dflash_serve.speculation.estimate import rate_of_length
from dflash_serve.speculation.simulation import (
    Moment,
    SimulatedEngine,
    Step,
    best_fixed,
    best_per_request,
    regret,
    tokens_per_second,
)
from dflash_serve.speculation.step_cost import StepCosts, generic, load

DRAFT_TOKENS = 15
CHOICES = (0, 1, 3, 5, 7, 15)
"""Of the Gemma-4 profiles."""
TASKS = ("math500", "gsm8k", "humaneval", "mbpp", "mt_bench")
BROKEN = "drafter that never guesses"
LOADS = (1, 8, 32, 64, 128)
SETTLE_SECONDS, STEADY_SECONDS = 3.0, 17.0
RAMP_SECONDS = 60.0
TURN_SECONDS = 10.0
GOAL, GOAL_SECONDS = 0.03, 2.0


def rates(task: str) -> tuple[float, ...]:
    length = 1.0 if task == BROKEN else acceptance_length(task)
    assert length is not None
    return (rate_of_length(length, DRAFT_TOKENS),) * DRAFT_TOKENS


def engine(costs: StepCosts, prior: StepCosts) -> SimulatedEngine:
    return SimulatedEngine(DraftLengthController(CHOICES, prior), costs)


def steady(costs: StepCosts, prior: StepCosts) -> list[dict[str, Any]]:
    rows = []
    for task in track([*TASKS, BROKEN], "steady loads", transient=True):
        for requests in LOADS:
            moment = Moment(requests, (rates(task),))
            simulated = engine(costs, prior)
            simulated.run(SETTLE_SECONDS, moment)
            steps = simulated.run(STEADY_SECONDS, moment)
            ours = tokens_per_second(steps)
            rows.append(
                {
                    "task": task,
                    "requests": requests,
                    "k": _usual(steps),
                    "best_k": best_fixed(costs, moment)[0],
                    "regret": regret(steps),
                    "over_ar": ours / best_fixed(costs, moment, [0])[1],
                    "over_k15": ours / best_fixed(costs, moment, [DRAFT_TOKENS])[1],
                }
            )
    return rows


def ramp(costs: StepCosts, prior: StepCosts) -> list[dict[str, Any]]:
    """1 to 128 requests and back in a minute, in even ratios."""
    rows = []
    for task in ("math500", "mt_bench", BROKEN):

        def moment(now: float, kind: tuple[float, ...] = rates(task)) -> Moment:
            height = 1 - abs(2 * now / RAMP_SECONDS - 1)
            return Moment(max(1, round(LOADS[-1] ** height)), (kind,))

        simulated = engine(costs, prior)
        steps = simulated.run(RAMP_SECONDS, moment)
        rows.append({"task": task, "regret": regret(steps), "steps": steps})
    return rows


def switches(costs: StepCosts, prior: StepCosts) -> list[dict[str, Any]]:
    """Chat, then maths, and so on, 10 s each; and a drafter that breaks and recovers."""
    rows = []
    for first, second in (("mt_bench", "math500"), (BROKEN, "math500")):
        for requests in (1, 8, 32, 64, 128):
            kinds = [Moment(requests, (rates(task),)) for task in (first, second)]
            simulated = engine(costs, prior)
            turns = [simulated.run(TURN_SECONDS, kinds[turn % 2]) for turn in range(6)]
            # the first turn is the start, not a switch
            late = [_seconds_to_follow(steps, costs, kinds[turn % 2]) for turn, steps in enumerate(turns) if turn]
            rows.append(
                {
                    "from": first,
                    "to": second,
                    "requests": requests,
                    "regret": regret([step for steps in turns[1:] for step in steps]),
                    "to_second_seconds": max(late[0::2]),
                    "to_first_seconds": max(late[1::2]),
                    "steps": simulated.steps,
                }
            )
    return rows


def mixed(costs: StepCosts) -> list[dict[str, Any]]:
    """Half maths, half chat in one batch: what a K for each request could give at most over one K for all."""
    rows = []
    for requests in LOADS[1:]:
        moment = Moment(requests, (rates("math500"), rates("mt_bench")))
        rows.append(
            {"requests": requests, "bound": best_per_request(costs, moment) / best_fixed(costs, moment, CHOICES)[1]}
        )
    return rows


def _usual(steps: Sequence[Step]) -> int:
    counts = [step.draft_tokens for step in steps]
    return max(set(counts), key=counts.count)


def _seconds_to_follow(steps: Sequence[Step], costs: StepCosts, moment: Moment) -> float:
    """Until half a second's choices are within 5 % of the best."""
    began, best = steps[0].at - steps[0].seconds, best_fixed(costs, moment, CHOICES)[1]
    for index, step in enumerate(steps):
        window = [other for other in steps[index:] if other.at < step.at + 0.5]
        if tokens_per_second(window) > 0.95 * best:
            return step.at - began
    return float("inf")


def report(found: dict[str, Any], about: str) -> str:
    lines = [
        "# Adaptive draft length, simulated",
        "",
        "`python -m benchmarks.adaptive_simulation`. **No engine ran**: recorded step costs, acceptance lengths of the",
        "model card (15 draft tokens), the same chance at each position. Regret: share of the best K's tokens that was",
        "not made. Choices: " + ", ".join(map(str, CHOICES)) + "; the best is of all K from 0 to 15.",
        "",
        f"Step costs: {about}",
        "",
    ]
    for prior, parts in found["priors"].items():
        worst = max(row["regret"] for row in parts["steady"] if row["task"] != BROKEN)
        lines += [
            f"## {prior}",
            "",
            f"Goal: within {GOAL:.0%} of the best in steady state on the card's tasks: "
            f"{'met' if worst <= GOAL else 'NOT met'} (largest regret {worst:.1%}).",
            "",
            "| task | requests | K | best K | regret | × K = 0 | × K = 15 |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['task']} | {r['requests']} | {r['k']} | {r['best_k']} | {r['regret']:.1%} | {r['over_ar']:.2f} | "
            f"{r['over_k15']:.2f} |"
            for r in parts["steady"]
        ]
        lines += ["", "Ramp from 1 to 128 requests and back in 60 s:", ""]
        lines += [f"- {row['task']}: regret {row['regret']:.1%}" for row in parts["ramp"]]
        lines += [
            "",
            f"Traffic that switches every {TURN_SECONDS:.0f} s: seconds until half a second's choices are within 5 %",
            f"of the best. Goal, {GOAL_SECONDS:.0f} s: {_followed(parts['switches'], 'mt_bench')} between chat and",
            f"maths; {_followed(parts['switches'], BROKEN)} when a drafter breaks or recovers.",
            "",
            "| from | to | requests | seconds there | seconds back | regret of all |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['from']} | {r['to']} | {r['requests']} | {r['to_second_seconds']:.1f} | "
            f"{r['to_first_seconds']:.1f} | {r['regret']:.1%} |"
            for r in parts["switches"]
        ]
        lines.append("")
    lines += [
        "## A K for each request",
        "",
        "Half maths, half chat in one batch; tokens/s at most over the best K for all (a bound: a step is taken to",
        "cost what as many tokens shared evenly cost, though steps of mixed lengths leave the whole CUDA graphs):",
        "",
        *(f"- {row['requests']} requests: {row['bound']:.3f}" for row in found["mixed"]),
        "",
        f"The choice and what it learns take {found['microseconds']:.0f} µs a step here.",
        "",
        "![Ramp and switches](adaptive-simulation.png)",
    ]
    return "\n".join(lines) + "\n"


def _followed(rows: Sequence[dict[str, Any]], first: str) -> str:
    seconds = max(max(r["to_second_seconds"], r["to_first_seconds"]) for r in rows if r["from"] == first)
    return f"{'met' if seconds <= GOAL_SECONDS else 'NOT met'} (longest {seconds:.1f} s)"


def draw(parts: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 6.4), layout="constrained")
    for axis, task in zip(axes[0], ("mt_bench", "math500"), strict=True):
        steps = next(row["steps"] for row in parts["ramp"] if row["task"] == task)
        _draw_choice(axis, steps, f"Ramp 1 → 128 → 1 requests, {task}")
        load = axis.twinx()
        load.plot([s.at for s in steps], [s.requests for s in steps], color="#bbbbbb", linewidth=1)
        load.set_ylabel("requests (grey)")
        load.set_yscale("log")
    for axis, (first, requests) in zip(axes[1], (("mt_bench", 128), (BROKEN, 32)), strict=True):
        row = next(r for r in parts["switches"] if (r["from"], r["requests"]) == (first, requests))
        _draw_choice(axis, row["steps"], f"{first} ↔ {row['to']} every 10 s, {requests} requests")
        for turn in range(1, 6):
            axis.axvline(turn * TURN_SECONDS, color="#cc4444", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_choice(axis: Any, steps: Sequence[Step], title: str) -> None:
    axis.plot([s.at for s in steps], [s.draft_tokens for s in steps], drawstyle="steps-pre", linewidth=0.9)
    axis.set(title=title, xlabel="seconds", ylabel="K", yticks=CHOICES)
    axis.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surface", default="gemma4-31b-h200", help="a bundled surface, or a .json file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adaptive-simulation"))
    options = parser.parse_args()
    costs = load(options.surface)
    found: dict[str, Any] = {"priors": {}, "mixed": mixed(costs)}
    for name, prior in (("Begun with that surface", costs), ("Begun with a guess (`step_costs: null`)", generic())):
        found["priors"][name] = {part.__name__: part(costs, prior) for part in (steady, ramp, switches)}
    found["microseconds"] = _microseconds(costs)
    text = report(found, costs.about)
    options.out.with_suffix(".md").write_text(text)
    draw(next(iter(found["priors"].values())), options.out.with_suffix(".png"))
    kept = json.dumps(found, indent=1, default=lambda _: None)
    options.out.with_suffix(".json").write_text(json.dumps(_without_steps(json.loads(kept)), indent=1) + "\n")
    print(text)


def _without_steps(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_steps(item) for key, item in value.items() if key != "steps"}
    if isinstance(value, list):
        return [_without_steps(item) for item in value]
    return value


def _microseconds(costs: StepCosts) -> float:
    """CPU time of `choose` and `observe` a step, at 64 requests."""
    controller = DraftLengthController(CHOICES, costs)
    outcomes = {(7, 3): 30, (7, 7): 20, (7, 0): 14}
    steps, now = 3000, 0.0
    began = time.process_time()
    for _ in range(steps):
        count = controller.choose(64, now)
        controller.observe(64, count, outcomes, 0.03, since_last=0.03)
        now += 0.03
    return 1e6 * (time.process_time() - began) / steps


if __name__ == "__main__":
    main()
