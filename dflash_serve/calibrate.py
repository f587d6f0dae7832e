"""Measures what engine steps take on this machine: `python -m dflash_serve.calibrate REQUEST.json RESULT.json`.

`dflash-serve calibrate` runs it in a process of its own: the engine wants its environment from the start. REQUEST holds
vLLM's engine arguments, loads, draft lengths and steps; RESULT gets seconds by load and draft length. For every load,
that many requests decode while the draft length is held at each K in turn, up and then down again, so that a drift of
the machine favours none.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 3
PROMPT_TOKENS = 64
MOST_STEPS_TO_DECODE = 2000


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    request = json.loads(Path(sys.argv[1]).read_text())
    # the terminal shows the progress, the log goes where it is asked for
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from vllm import LLM

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("starting the engine", total=None)
        llm = LLM(**request["engine"])
        loads, choices = request["requests"], request["draft_tokens"]
        progress.update(bar, total=2 * len(loads) * len(choices))
        samples: dict[str, list[float]] = {}
        for (requests, count), seconds in measure(llm, loads, choices, request["steps"]):
            samples.setdefault(f"{requests} {count}", []).extend(seconds)
            progress.update(bar, advance=1, description=f"{requests} requests, {count} draft tokens")
    Path(sys.argv[2]).write_text(json.dumps({"samples": samples, "runner": _runner(llm)}))


def measure(
    llm: Any, loads: list[int], choices: list[int], steps: int
) -> Iterator[tuple[tuple[int, int], list[float]]]:
    """(requests, K) and the seconds of `steps` steps; loads that do not fit the KV cache give nothing."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    for requests in loads:
        for turn, count in enumerate([*choices, *reversed(choices)]):
            scheduler.draft_length.force(count)
            names = _add(engine, requests, count, steps, turn)
            seconds = _steps(engine, scheduler, requests, count, steps)
            engine.abort_request(names)
            while engine.has_unfinished_requests():
                engine.step()
            yield (requests, count), seconds
    scheduler.draft_length.force(None)


def _add(engine: Any, requests: int, count: int, steps: int, turn: int) -> list[str]:
    from vllm import SamplingParams

    numbers = random.Random(requests)
    # as many tokens as the steps can give if all drafts are accepted
    longest = engine.model_config.max_model_len - PROMPT_TOKENS - 1
    most = max(min((steps + WARM_UP_STEPS + 8) * (count + 1), longest), 1)
    sampling = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
    names = []
    for index in range(requests):
        prompt = [numbers.randrange(100, 1000) for _ in range(PROMPT_TOKENS)]
        name = f"{requests}-{count}-{turn}-{index}"
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        names.append(name)
    return names


def _steps(engine: Any, scheduler: Any, requests: int, count: int, steps: int) -> list[float]:
    """Seconds of steps in which all `requests` decode with K held at `count`."""
    seen: list[float] = []

    def watch(running: int, draft_tokens: int, seconds: float | None, steady: bool) -> None:
        if seconds is not None and steady and running == requests and draft_tokens == count:
            seen.append(seconds)

    scheduler.on_step = watch
    try:
        for _ in range(MOST_STEPS_TO_DECODE):
            if len(seen) >= steps + WARM_UP_STEPS or not engine.has_unfinished_requests():
                break
            engine.step()
    finally:
        scheduler.on_step = None
    return seen[WARM_UP_STEPS:]


def _runner(llm: Any) -> str:
    return "V2" if getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False) else "V1"


if __name__ == "__main__":
    main()
