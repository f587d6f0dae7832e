"""Stages, loads and settings of the servers that are started; the card."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dflash_serve import hardware
from dflash_serve.bench import overhead
from dflash_serve.bench.card import CARD, acceptance_length
from dflash_serve.bench.run import (
    Load,
    Stage,
    draft_tokens_of,
    ordered,
    pair_stages,
    request_body,
    run,
    speculation_of,
    synthetic_options,
)
from dflash_serve.bench.servers import Server, ServerError, vllm_config
from dflash_serve.hardware import Cluster
from dflash_serve.settings import resolve


def test_the_card_agrees_with_itself() -> None:
    assert len(CARD) == 15
    for published in CARD.values():
        # whole tokens/s and one decimal are printed: the ratio lies between those of what they may have been
        low = (published.dflash - 0.5) / (published.autoregressive + 0.5) - 0.05
        high = (published.dflash + 0.5) / (published.autoregressive - 0.5) + 0.05
        assert low <= published.speedup <= high


def test_a_side_changes_how_the_settings_speculate() -> None:
    assert speculation_of("ar") == ("AR", {"mode": "off"})
    assert speculation_of("dflash") == ("DFlash", {})
    assert speculation_of("adaptive") == ("adaptive", {"mode": "adaptive"})
    assert speculation_of(" K=7") == ("K=7", {"mode": "fixed", "max_draft_tokens": 7})
    for wrong in ("", "k", "k=", "k=0", "k=-1", "k=x", "7"):
        with pytest.raises(ValueError, match=r"--sides: no side .* there are ar, dflash, adaptive, and k=N"):
            speculation_of(wrong)


def test_sides_of_a_run_and_their_order() -> None:
    sides = ["ar", "k=5", "adaptive", "k=5"]
    stages = pair_stages(["gsm8k", "mbpp"], {}, sides, plain=False, synthetic=False)
    assert [(stage.side, stage.tasks) for stage in stages] == [
        (side, ("gsm8k", "mbpp")) for side in ("AR", "K=5", "adaptive")
    ]
    assert [stage.side for stage in ordered(stages, 1)] == ["adaptive", "K=5", "AR"]


def test_each_side_serves_the_settings_with_its_own_speculation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[dict[str, Any]] = []
    monkeypatch.setattr("dflash_serve.bench.run.dflash_server", lambda folder, args, *, plain: served.append(args))
    args = {"profile": "smollm2-cpu", "speculation": {"max_draft_tokens": 3, "options": {"a": 1}}}
    for stage in pair_stages(["gsm8k"], args, ["ar", "dflash", "adaptive", "k=5"], plain=False, synthetic=False):
        assert stage.start is not None
        stage.start(tmp_path)
    own = {"max_draft_tokens": 3, "options": {"a": 1}}
    assert [args["speculation"] for args in served] == [
        own | {"mode": "off"},
        own,
        own | {"mode": "adaptive"},
        own | {"mode": "fixed", "max_draft_tokens": 5},
    ]
    assert {args["profile"] for args in served} == {"smollm2-cpu"}


@pytest.mark.parametrize("mode", ["off", False])
def test_settings_that_do_not_speculate_are_no_dflash_side(mode: object) -> None:
    with pytest.raises(ValueError, match=r"--sides: dflash .* speculation\.mode is off"):
        pair_stages(["gsm8k"], {"speculation": {"mode": mode}}, ["ar", "dflash"], plain=False, synthetic=False)


def test_forced_acceptance_takes_a_server_a_task() -> None:
    named = {"profile": "smollm2-cpu"}
    stages = pair_stages(["gsm8k", "mbpp"], named, ["ar", "k=15", "adaptive"], plain=False, synthetic=True)
    assert [(stage.side, stage.tasks) for stage in stages] == [
        ("AR", ("gsm8k", "mbpp")),
        ("K=15", ("gsm8k",)),
        ("K=15", ("mbpp",)),
        ("adaptive", ("gsm8k",)),
        ("adaptive", ("mbpp",)),
    ]
    rates = synthetic_options("gsm8k", 15)["synthetic_acceptance_rates"]
    assert 1 + sum(rates) == pytest.approx(acceptance_length("gsm8k"), abs=1e-4) == pytest.approx(7.53, abs=1e-4)
    assert rates == sorted(rates, reverse=True), "a draft token counts when all before it do"
    # of fewer draft tokens the first are what they were
    assert synthetic_options("gsm8k", 3)["synthetic_acceptance_rates"] == rates[:3]
    assert draft_tokens_of({**named, "speculation": {"max_draft_tokens": 7}}) == 7
    with pytest.raises(ValueError, match="no acceptance length for 'sample'"):
        pair_stages(["sample"], named, ["dflash"], plain=False, synthetic=True)


def test_on_a_gpu_the_settings_name_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    with pytest.raises(ValueError, match=r"--settings: name a `profile` in it; .* known to Ray alone"):
        pair_stages(["gsm8k"], {}, ["adaptive"], plain=False, synthetic=True)
    # not where the side says how many
    assert pair_stages(["gsm8k"], {}, ["k=7"], plain=False, synthetic=True)


def test_a_load_sends_at_least_one_conversation_a_stream() -> None:
    (stage,) = pair_stages(["t"], {}, ["ar"], plain=False, synthetic=False)
    tasks = {"t": [["a"], ["b"], ["c"]]}
    assert Load(tasks, 2, (1, 8)).conversations(stage) == 2 + 8
    assert Load(tasks, 9, (1, 8)).conversations(stage) == 3 + 8, "no more than the task has"
    assert Load(tasks, 2, (1, 8), per_stream=4).conversations(stage) == 4 + 32


def test_thinking_is_the_templates_own_unless_said() -> None:
    assert request_body(9, thinking=None, ignore_eos=False) == {"max_tokens": 9, "temperature": 0}
    assert request_body(9, thinking=True, ignore_eos=False)["chat_template_kwargs"] == {"enable_thinking": True}


def test_vllm_serve_gets_the_engine_settings_of_our_replica() -> None:
    settings = resolve({"profile": "smollm2-cpu", "speculation": {"mode": "off"}}, Cluster(cpus=2, gpus={})).settings
    options = vllm_config(settings.model_copy(update={"target": "some/model"}), 1234)
    assert options["max-num-seqs"] == settings.engine["max_num_seqs"]
    assert options["enforce-eager"] is True
    assert options["port"] == 1234
    assert options["model"] == "some/model"
    assert "speculative-config" not in options
    assert None not in options.values()


def test_answers_of_spread_lengths_are_the_same_for_every_side() -> None:
    tasks = {"sample": [["one"], ["two"], ["three"]]}
    load = Load(tasks, 3, (200,), {"max_tokens": 100, "temperature": 0}, spread=0.5)
    bodies = load.bodies("sample", 200)
    assert bodies == load.bodies("sample", 200)
    lengths = [body.pop("max_tokens") for body in bodies]
    assert (len(lengths), bodies[0]) == (200, {"temperature": 0})
    assert overhead.lengths(100, 0.5) == "50 to 150"
    assert (overhead.lengths(4, 0.9), overhead.lengths(128, 0)) == ("2 to 8", "128")
    assert 50 <= min(lengths) < 60
    assert 140 < max(lengths) <= 150
    assert sum(lengths) / len(lengths) == pytest.approx(100, rel=0.05)


def test_answers_are_all_alike_unless_they_are_to_spread() -> None:
    load = Load({"sample": [["one"]]}, 1, (8,), {"max_tokens": 100})
    assert load.bodies("sample", 8) == [{"max_tokens": 100}] * 8
    assert Load({"sample": [["one"]]}, 1, (8,), spread=0.5).bodies("sample", 8) == [{}] * 8


@pytest.mark.parametrize("fails_in", [None, 4])
def test_interleaved_sides_take_turns_while_the_others_are_suspended(
    fails_in: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: dict[str, psutil.Process] = {}
    ended: dict[str, str] = {}
    cells: list[tuple[int, int, str]] = []

    def start(side: str) -> Any:
        @contextlib.contextmanager
        def server(_: Path) -> Iterator[Server]:
            with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
                servers[side] = psutil.Process(process.pid)
                try:
                    yield Server(1, process, tmp_path / "log")
                finally:
                    ended[side] = servers[side].status()
                    process.kill()

        return server

    async def ready(_: object, endpoint: object, *__: object) -> object:
        return endpoint

    async def measure(*_: object, side: str, concurrency: int, number: int, **__: object) -> Any:
        if len(cells) == fails_in:
            raise ServerError("it fell over")
        cells.append((number, concurrency, side))
        still = {name for name, process in servers.items() if process.status() == psutil.STATUS_STOPPED}
        assert still == servers.keys() - {side}
        return SimpleNamespace(side=side)

    for name, fake in (("prepare", ready), ("warm_up", ready), ("measure", measure)):
        monkeypatch.setattr(f"dflash_serve.bench.run.{name}", fake)
    monkeypatch.setattr("dflash_serve.bench.run.SETTLE_SECONDS", 0)
    view: Any = SimpleNamespace(**dict.fromkeys(("total", "doing", "note", "advance", "show"), lambda *_: None))
    kept: list[Any] = []
    stages = [Stage(side, ("t",), start(side)) for side in ("a", "b", "c")]
    load = Load({"t": [["one"]]}, 1, (1, 8))
    with pytest.raises(ServerError) if fails_in else contextlib.nullcontext():
        asyncio.run(run(stages, load, 2, view, kept, lambda: None, interleave=True))
    forth, back = ("a", "b", "c"), ("c", "b", "a")
    every = [(number, n, side) for number, order in enumerate((forth, back)) for n in (1, 8) for side in order]
    assert cells == every[:fails_in]
    assert [sample.side for sample in kept] == [side for _, _, side in cells]
    # a suspended one would not hear that it is to end
    assert set(ended) == {"a", "b", "c"}
    assert psutil.STATUS_STOPPED not in ended.values()
