"""Runs stages one after the other: a server, the tasks asked of it, at each concurrency."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from dflash_serve.bench import card
from dflash_serve.bench.client import Endpoint, session
from dflash_serve.bench.measure import measure, prepare, warm_up
from dflash_serve.bench.samples import Sample
from dflash_serve.bench.servers import Server, dflash_server, suspended
from dflash_serve.bench.summary import AUTOREGRESSIVE
from dflash_serve.bench.tasks import Conversation
from dflash_serve.bench.view import View
from dflash_serve.hardware import need_profile, this_machine
from dflash_serve.settings.profiles import merge, resolve
from dflash_serve.speculation.estimate import rate_of_length

FORCED = f"the same chance for each draft token, such that the card's {card.DRAFT_TOKENS} give its acceptance length"
"""How `synthetic_options` accept."""
LENGTHS_SEED = 0
SETTLE_SECONDS = 1.0
"""For a server that was suspended: its timers are all due at once."""
SHORTEST_ANSWER = 2
"""Tokens: one has no time per token."""
PROFILE_MEND = "--settings: name a `profile` in it"

Tasks = Mapping[str, list[Conversation]]
Start = Callable[[Path], contextlib.AbstractContextManager[Server]]
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One side, and all that is asked of it before the next stage."""

    side: str
    tasks: tuple[str, ...]
    start: Start | None = None
    """Starts its server in a folder; None when `endpoint` is there already."""
    endpoint: Endpoint | None = None


@dataclass(frozen=True)
class Load:
    """What every stage is asked."""

    tasks: Tasks
    samples: int
    """Conversations of a cell, where the task has as many."""
    concurrencies: tuple[int, ...]
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields of each request's body: output limit, temperature, …"""
    api_key: str = "none"
    per_stream: int = 1
    """Conversations of a cell for each of its streams, at least."""
    spread: float = 0.0
    """By what share of the output limit answers are shorter or longer than it: those of one length that begin together
    end together, so that the next come as one burst too."""

    def count(self, task: str, concurrency: int) -> int:
        """Conversations of one cell."""
        return max(min(self.samples, len(self.tasks[task])), self.per_stream * concurrency)

    def bodies(self, task: str, concurrency: int) -> list[dict[str, Any]]:
        """What is sent with each conversation of a cell, the same for every side."""
        count = self.count(task, concurrency)
        numbers, limit = random.Random(LENGTHS_SEED), self.body.get("max_tokens")
        if not self.spread or limit is None:
            return [dict(self.body) for _ in range(count)]
        limits = [limit * numbers.uniform(1 - self.spread, 1 + self.spread) for _ in range(count)]
        return [{**self.body, "max_tokens": at_least(one)} for one in limits]

    def conversations(self, stage: Stage) -> int:
        return sum(self.count(task, concurrency) for task in stage.tasks for concurrency in self.concurrencies)


def at_least(tokens: float) -> int:
    """An answer's length, in whole tokens."""
    return max(round(tokens), SHORTEST_ANSWER)


def request_body(max_tokens: int, *, thinking: bool | None, ignore_eos: bool) -> dict[str, Any]:
    """Greedy; `thinking` None leaves it to the model's chat template; `ignore_eos` (vLLM, SGLang) always gives
    `max_tokens`."""
    body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
    if thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
    if ignore_eos:
        body["ignore_eos"] = True
    return body


def speculation_of(side: str) -> tuple[str, dict[str, Any]]:
    """What reports call a side, and what it lays over `speculation` of the settings.

    `ar`: no drafter; `dflash`: the settings as they are; `adaptive`; `k=N`: always N draft tokens. Raises ValueError.
    """
    match side.strip().lower().split("="):
        case ["ar"]:
            return AUTOREGRESSIVE, {"mode": "off"}
        case ["dflash"]:
            return "DFlash", {}
        case ["adaptive"]:
            return "adaptive", {"mode": "adaptive"}
        case ["k", number] if number.isdecimal() and int(number) > 0:
            return f"K={int(number)}", {"mode": "fixed", "max_draft_tokens": int(number)}
    raise ValueError(f"--sides: no side {side!r}; there are ar, dflash, adaptive, and k=N with N draft tokens (k=7)")


def pair_stages(
    tasks: Sequence[str], args: Mapping[str, Any], sides: Sequence[str], *, plain: bool, synthetic: bool
) -> list[Stage]:
    """The same settings with each of the `sides`; see `speculation_of`. Raises ValueError.

    `synthetic`: dummy weights, and a server a task, because its acceptance is forced to the card's for that task.
    """
    common = merge(dict(args), {"engine": {"load_format": "dummy"}}) if synthetic else dict(args)
    for task in tasks if synthetic else ():
        forced_length(task)

    def start(changes: dict[str, Any]) -> Start:
        laid_over = merge(common, {"speculation": changes})
        return lambda folder: dflash_server(folder, laid_over, plain=plain)

    stages = []
    for name, changes in dict(map(speculation_of, sides)).items():
        if not changes and not speculates(args):
            raise ValueError("--sides: dflash is the settings as they are, and their speculation.mode is off; take k=N")
        if synthetic and name != AUTOREGRESSIVE:
            most = changes.get("max_draft_tokens") or draft_tokens_of(merge(common, {"speculation": changes}))
            for task in tasks:
                stages.append(Stage(name, (task,), start(changes | {"options": synthetic_options(task, most)})))
        else:
            stages.append(Stage(name, tuple(tasks), start(changes)))
    return stages


def speculates(args: Mapping[str, Any]) -> bool:
    """Whether the settings leave speculation on."""
    return (args.get("speculation") or {}).get("mode") not in ("off", False)


def draft_tokens_of(args: Mapping[str, Any]) -> int:
    """The most that these settings verify at once. Raises SettingsError; ValueError on a GPU when they name no
    profile."""
    need_profile(args, PROFILE_MEND)
    return resolve(args, this_machine(), read_config=lambda _: None).settings.speculation.max_draft_tokens


def forced_length(task: str) -> float:
    """The card's acceptance length; ValueError for a task that it lacks."""
    length = card.acceptance_length(task)
    if length is None:
        raise ValueError(
            f"--synthetic: the card has no acceptance length for {task!r}; take --tasks of {', '.join(card.TASKS)}"
        )
    return length


def synthetic_options(task: str, draft_tokens: int) -> dict[str, Any]:
    """Fields of vLLM's `speculative_config` that accept at the card's rate whatever was drafted; ValueError as
    `forced_length`.

    The same chance at each position. vLLM's own `synthetic_acceptance_length` would accept the first draft tokens
    always and those behind them never: at 4.23, three draft tokens would give what fifteen do.
    """
    rate = rate_of_length(forced_length(task), card.DRAFT_TOKENS)
    rates = [round(rate**position, 6) for position in range(1, draft_tokens + 1)]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def ordered(sides: Sequence[T], number: int) -> list[T]:
    """Every second round from the last to the first, so that a drift of the machine favours no side."""
    return list(sides) if number % 2 == 0 else list(reversed(sides))


async def run(
    stages: Sequence[Stage],
    load: Load,
    rounds: int,
    view: View,
    samples: list[Sample],
    keep: Callable[[], None],
    *,
    interleave: bool = False,
) -> None:
    """Puts each cell into `samples` when it is measured and calls `keep`, so that a run cut short leaves what it found.

    Args:
        interleave: Start every side once, before the first round, and suspend those that are not measured: a cell of
            one side and the same of the next are seconds apart.

    Raises EndpointError or ServerError.
    """
    view.total(rounds * sum(load.conversations(stage) for stage in stages))
    measuring = _Measuring(load, view, samples, keep)
    if not interleave:
        for number in range(rounds):
            for stage in ordered(stages, number):
                with _started(stage, load, view) as side:
                    await measuring.cells(side, load.concurrencies, number)
        return
    with contextlib.ExitStack() as stack:
        sides = []
        for stage in stages:
            sides.append(stack.enter_context(_started(stage, load, view)))
            # an interrupt meanwhile is raised here
            await asyncio.sleep(0)
        for number in range(rounds):
            for concurrency in load.concurrencies:
                for side in ordered(sides, number):
                    with _others_suspended(side, sides):
                        await asyncio.sleep(SETTLE_SECONDS)
                        await measuring.cells(side, (concurrency,), number)


@dataclass(frozen=True)
class _Side:
    """A stage whose server runs."""

    stage: Stage
    endpoint: Endpoint
    server: Server | None


@dataclass(frozen=True)
class _Measuring:
    """Takes samples, and tells of them."""

    load: Load
    view: View
    samples: list[Sample]
    keep: Callable[[], None]

    async def cells(self, side: _Side, concurrencies: Sequence[int], number: int) -> None:
        """All tasks of a side at each concurrency."""
        stage, load, server = side.stage, self.load, side.server
        async with session() as http:
            ready = await prepare(http, side.endpoint)
            for concurrency in concurrencies:
                self.view.doing(f"{stage.side}: warming up")
                await warm_up(http, ready, concurrency)
                for task in stage.tasks:
                    self.view.doing(f"round {number + 1}, {stage.side}: {task}, {concurrency} at once")
                    sample = await measure(
                        http,
                        ready,
                        load.tasks[task],
                        side=stage.side,
                        task=task,
                        concurrency=concurrency,
                        number=number,
                        bodies=load.bodies(task, concurrency),
                        server_cpu_seconds=server.cpu_seconds if server else None,
                        done=self.view.advance,
                    )
                    self.samples.append(sample)
                    self.keep()
                    self.view.show(self.samples)


@contextlib.contextmanager
def _others_suspended(side: _Side, sides: Sequence[_Side]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for other in sides:
            if other is not side and other.server is not None:
                stack.enter_context(suspended(other.server.process.pid))
        yield


@contextlib.contextmanager
def _started(stage: Stage, load: Load, view: View) -> Iterator[_Side]:
    if stage.endpoint is not None:
        yield _Side(stage, replace(stage.endpoint, body=load.body), None)
        return
    assert stage.start is not None
    view.doing(f"starting {stage.side}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, stage.start(Path(folder)) as server:
        view.note(f"{stage.side}: ready after {server.start_seconds:.0f} s")
        yield _Side(stage, Endpoint(f"{server.url}/v1", api_key=load.api_key, body=load.body), server)
        view.doing(f"stopping {stage.side}")
