"""`dflash-serve bench run|overhead|report`."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from dflash_serve.bench.report import Report
    from dflash_serve.bench.run import Load, Stage
    from dflash_serve.bench.samples import Sample

app = typer.Typer(no_args_is_help=True, help="Measure what DFlash earns, and what serving costs.")

SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="YAML file of `args` for the servers started (default: profile auto).")
]
DEFAULT_SIDES = "ar,dflash"
Rounds = Annotated[int, typer.Option(min=1, help="Repetitions; figures are medians with spread.")]
Out = Annotated[Path, typer.Option(help="Reports are written here, with .json, .md, .html, .png, .svg.")]


@app.command()
def run(
    *,
    url: Annotated[str | None, typer.Option(help="Measure this API (…/v1): ours, vLLM's, SGLang's.")] = None,
    baseline_url: Annotated[
        str | None, typer.Option(help="With --url: the same target without a drafter, for the speed-up.")
    ] = None,
    pair: Annotated[bool, typer.Option("--pair", help="Start the servers here, in turn: see --sides.")] = False,
    sides: Annotated[
        str,
        typer.Option(
            help="With --pair, of: ar (no drafter), dflash (the settings as they are), adaptive, k=N (N draft tokens)."
        ),
    ] = DEFAULT_SIDES,
    model: Annotated[str, typer.Option(help="With --url: its model (default: the first that it lists).")] = "",
    tasks: Annotated[
        str, typer.Option(help="Of math500, gsm8k, humaneval, mbpp, mt_bench, sample (bundled), random, or FILE.jsonl.")
    ] = "math500,gsm8k,humaneval,mbpp,mt_bench",
    data: Annotated[Path | None, typer.Option(help="Folder of <task>.jsonl (default: the Hugging Face hub).")] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Conversations a task; at least as many as streams are sent.")
    ] = 32,
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,32",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most output tokens of an answer.")] = 4096,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Chat template's switch (default: as it is).")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Always give --max-tokens (vLLM, SGLang).")] = False,
    words: Annotated[int, typer.Option(min=1, help="Words of a random prompt.")] = 200,
    rounds: Rounds = 1,
    settings: SettingsFile = None,
    plain: Annotated[bool, typer.Option("--plain", help="With --pair: servers as `up --plain` starts them.")] = False,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic",
            help="With --pair: dummy weights, the model card's acceptance forced; --settings names the profile.",
        ),
    ] = False,
    api_key_env: Annotated[str, typer.Option(help="Variable that holds the API key.")] = "OPENAI_API_KEY",
    metrics_url: Annotated[
        str | None, typer.Option(help="With --url: a Prometheus page with its counters (default: its /metrics).")
    ] = None,
    out: Out = Path("dflash-bench"),
) -> None:
    """The model card's table: tokens/s, speed-up, acceptance, latencies, for each task and concurrency."""
    _need_matplotlib()
    from dflash_serve.bench import tasks as prompts
    from dflash_serve.bench.client import Endpoint
    from dflash_serve.bench.report import RUN, Report, about
    from dflash_serve.bench.run import FORCED, Load, Stage, pair_stages, request_body
    from dflash_serve.bench.summary import AUTOREGRESSIVE

    if pair == (url is not None):
        _fail("give --url of a server that runs, or --pair to start both here")
    with_pair = {"--sides": sides != DEFAULT_SIDES, "--settings": settings, "--plain": plain, "--synthetic": synthetic}
    with_url = {"--baseline-url": baseline_url, "--model": model, "--metrics-url": metrics_url}
    for option, given in (with_url if pair else with_pair).items():
        if given:
            _fail(f"{option}: works with {'--url' if pair else '--pair'} alone")
    key = os.environ.get(api_key_env) or "none"
    try:
        levels = _numbers("--concurrency", concurrency)
        names = [name.strip() for name in tasks.split(",")]
        # every stream has a prompt of its own where the task has so many
        chosen = prompts.load(names, folder=data, samples=max(samples, *levels), words=words)
        # dummy weights never end an answer by themselves, or all at once
        body = request_body(max_tokens, thinking=thinking, ignore_eos=ignore_eos or synthetic)
        load = Load(chosen, samples, levels, body, key)
        if pair:
            args = _args(settings)
            stages = pair_stages(list(chosen), args, sides.split(","), plain=plain, synthetic=synthetic)
            served = {"servers": f"`up{' --plain' if plain else ''}`, {settings.name if settings else 'profile auto'}"}
            served |= {"forced acceptance": FORCED} if synthetic else {}
        else:
            assert url is not None
            side = Endpoint(url.rstrip("/"), model=model, api_key=key, metrics_url=metrics_url)
            stages = [Stage("endpoint", tuple(chosen), endpoint=side)]
            if baseline_url:
                base = Endpoint(baseline_url.rstrip("/"), model=model, api_key=key)
                stages.insert(0, Stage(AUTOREGRESSIVE, tuple(chosen), endpoint=base))
            served = {"servers": url + (f"; AR: {baseline_url}" if baseline_url else "")}
    except ValueError as error:
        _fail(str(error))
    requests = f"greedy, at most {max_tokens} tokens, {samples} conversations a task, {rounds} round(s)"
    described = served | {
        "requests": requests + ("" if thinking is None else f", thinking {'on' if thinking else 'off'}")
    }
    empty = Report(RUN, about(servers_here=pair, **described), synthetic, AUTOREGRESSIVE, [])
    _measure(stages, load, rounds, empty, out)


@app.command()
def overhead(
    *,
    concurrency: Annotated[str, typer.Option(help="Streams at once.")] = "1,8,32,128",
    max_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of an answer, on average.")] = 128,
    spread: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="By what share answers are shorter or longer. 0: all alike, so that streams end and begin in bursts.",
        ),
    ] = 0.5,
    words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Requests of a concurrency, at least.")] = 16,
    per_stream: Annotated[int, typer.Option(min=1, help="Requests a stream, at least.")] = 4,
    rounds: Rounds = 3,
    settings: SettingsFile = None,
    sides: Annotated[str, typer.Option(help="Which of vllm (`vllm serve`), plain and up.")] = "vllm,plain,up",
    interleave: Annotated[
        bool,
        typer.Option(
            "--interleave",
            help="Start each side once and measure them in turns of one concurrency's requests, the others "
            "suspended; the device has to hold them all.",
        ),
    ] = False,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Dummy weights, MT-Bench's acceptance of the model card forced.")
    ] = False,
    out: Out = Path("dflash-overhead"),
) -> None:
    """Plain `vllm serve`, `up --plain` and `up` on the same engine settings: throughput, added TTFT and ITL."""
    _need_matplotlib()
    from dflash_serve.bench import overhead as front_end
    from dflash_serve.bench import tasks as prompts
    from dflash_serve.bench.report import OVERHEAD, Report, about
    from dflash_serve.bench.run import FORCED, Load, draft_tokens_of, request_body, speculates, synthetic_options
    from dflash_serve.settings.profiles import merge

    try:
        levels = _numbers("--concurrency", concurrency)
        args = _args(settings)
        drafts = speculates(args)
        if synthetic:
            args = merge(args, {"engine": {"load_format": "dummy"}})
        if synthetic and drafts:
            forced = synthetic_options("mt_bench", draft_tokens_of(args))
            args = merge(args, {"speculation": {"options": forced}})
        stages = front_end.stages(args, levels, sides.split(","))
        chosen = prompts.load([prompts.RANDOM], folder=None, samples=max(samples, *levels), words=words)
    except ValueError as error:
        _fail(str(error))
    body = request_body(max_tokens, thinking=None, ignore_eos=True)
    load = Load(chosen, samples, levels, body, per_stream=per_stream, spread=spread)
    described = {
        "settings": settings.name if settings else "profile auto",
        "requests": f"{words} random words, {front_end.lengths(max_tokens, spread)} tokens; {per_stream} a stream, at "
        f"least {samples}; {rounds} round(s)",
    }
    described |= (
        {"sides": "interleaved: all started once, measured in turns, the others suspended"} if interleave else {}
    )
    described |= {} if drafts else {"drafter": "none"}
    described |= {"forced acceptance": FORCED} if synthetic and drafts else {}
    empty = Report(OVERHEAD, about(servers_here=True, **described), synthetic, front_end.VLLM, [])
    _measure(stages, load, rounds, empty, out, interleave=interleave)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="JSON report of an earlier run.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Where to (default: beside FILE).")] = None,
) -> None:
    """Write Markdown, HTML and pictures of an earlier run anew."""
    _need_matplotlib()
    from dflash_serve.bench.report import Report

    try:
        found = Report.read(file)
    except ValueError as error:
        _fail(str(error))
    _write(found, out or file.with_suffix(""))


def _measure(
    stages: Sequence[Stage], load: Load, rounds: int, empty: Report, out: Path, *, interleave: bool = False
) -> None:
    """Runs, fills the report and writes it, also of a run that is cut short. Exits with 1 when anything failed."""
    from dflash_serve.bench.client import EndpointError
    from dflash_serve.bench.report import write_json
    from dflash_serve.bench.run import run as run_stages
    from dflash_serve.bench.servers import ServerError
    from dflash_serve.bench.view import View, make_console

    # as Ctrl-C: the server that is being measured is stopped; a script's background job begins with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    measured: list[Sample] = []
    problem = ""

    def found(problem: str) -> Report:
        more = {"not complete": problem.split("\n")[0].rstrip(":")} if problem else {}
        return replace(empty, about=empty.about | more, samples=measured)

    def keep() -> None:
        write_json(found("killed, or still at it"), out)

    try:
        with View(make_console(), empty.baseline) as view:
            asyncio.run(run_stages(stages, load, rounds, view, measured, keep, interleave=interleave))
    except (EndpointError, ServerError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    failed = [request.error for sample in measured for request in sample.requests if request.error]
    if not problem and failed:
        problem = f"{len(failed)} requests failed; the first: {failed[0]}"
    if measured:
        _write(found(problem), out)
    if problem:
        _fail(problem)


def _write(found: Report, out: Path) -> None:
    from dflash_serve.bench.report import write
    from dflash_serve.bench.view import fitting_table, make_console

    console = make_console()
    console.print(fitting_table(found.rows, console))
    for path in write(found, out):
        console.print(f"  {path}", highlight=False)


def _args(path: Path | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        args = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--settings: {path}: {error}") from None
    if not isinstance(args, dict):
        raise ValueError(f"--settings: {path} must hold what stands under `args` in serve_config.yaml")
    return args


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{option}: must be whole numbers from 1, with commas between; it is {text!r}")
    return numbers


def _need_matplotlib() -> None:
    """Before a run of minutes, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        _fail("pictures need matplotlib: pip install 'dflash-serve[bench]'")


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
