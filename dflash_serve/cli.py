"""The `dflash-serve` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dflash_serve.bench.cli import app as bench
from dflash_serve.monitoring import latest_session

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve large language models with DFlash speculative decoding.",
)

app.add_typer(bench, name="bench")


@app.callback()
def _root() -> None:
    """Keeps `up` a named command while it is the only one of its kind."""


@app.command()
def up(
    config: Annotated[Path, typer.Argument(help="Serve configuration file.")] = Path("serve_config.yaml"),
    *,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster to deploy to (default: start one on this machine).")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Ray Serve's own proxy, as `serve run` has it, not HAProxy.")
    ] = False,
) -> None:
    """Start Ray and the application of CONFIG on this machine, with the high-throughput ingress; Ctrl-C stops it."""
    from deployments.up import run

    raise typer.Exit(run(config, address=address, plain=plain))


@app.command()
def preflight(
    config: Annotated[Path, typer.Argument(help="Serve configuration file.")] = Path("serve_config.yaml"),
    *,
    profile: Annotated[str | None, typer.Option(help="Check with this profile instead of the configuration's.")] = None,
) -> None:
    """Check CONFIG without starting anything: models that do not fit each other, memory, what would be slow."""
    from deployments.preflight import run

    raise typer.Exit(run(config, profile=profile))


@app.command()
def calibrate(
    config: Annotated[Path, typer.Argument(help="Serve configuration file.")] = Path("serve_config.yaml"),
    *,
    profile: Annotated[str | None, typer.Option(help="With this profile instead of the configuration's.")] = None,
    out: Annotated[Path, typer.Option(help="Written here, with .json, .yaml, .png, .svg.")] = Path("step-costs"),
    requests: Annotated[str, typer.Option(help="Loads, such as 1,8,32 (default: powers of two).")] = "",
    steps: Annotated[int, typer.Option(min=4, help="Steps of each load and draft length, twice.")] = 16,
) -> None:
    """Measure what engine steps take on this machine, for adaptive speculation to begin with."""
    from deployments.calibrate import run

    try:
        loads = [int(part) for part in requests.split(",") if part]
    except ValueError:
        loads = [0]
    if any(load < 1 for load in loads):
        raise typer.BadParameter("must be numbers from 1, separated by commas", param_hint="--requests")
    raise typer.Exit(run(config, profile=profile, out=out, requests=loads, steps=steps))


@app.command()
def prepare() -> None:
    """Make the bundled model pair (done by `up` too); prints where it lies."""
    from dflash_serve.demo.__main__ import main as make_pair

    raise typer.Exit(make_pair())


@app.command()
def top(
    prometheus: Annotated[
        str | None, typer.Option(help="URL of a Prometheus that scrapes the fleet (default: start one for SESSION).")
    ] = None,
    *,
    session: Annotated[
        Path | None, typer.Option(help="Folder of the Ray session on this machine (default: the last one started).")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    refresh: Annotated[float, typer.Option(min=0.5, help="Seconds between views.")] = 5,
) -> None:
    """Show the fleet live: replicas, load, acceptance by position, K, speed-up, alerts."""
    from rich.console import Console

    from dflash_serve.monitoring.top import run

    raise typer.Exit(
        run(Console(), url=prometheus, session=session or latest_session(), once=once, refresh_seconds=refresh)
    )


def main() -> None:
    app()
