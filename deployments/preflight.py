"""`dflash-serve preflight`: what `build` checks, without deploying."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from deployments.app import check, check_names_of_vllm
from deployments.up import load_config, our_applications
from dflash_serve import preflight
from dflash_serve.hardware import this_machine
from dflash_serve.settings import SettingsError

console = Console(highlight=False)


def run(config_path: Path, *, profile: str | None) -> int:
    """Print what is found in each of our applications. Returns the exit status: 1 when something is wrong.

    Args:
        profile: Instead of the one that the configuration names.
    """
    try:
        config = load_config(config_path)
        applications = our_applications(config)
        if not applications:
            raise ValueError("no application with import_path deployments.app:build; name one")
        failed = False
        for application in applications:
            args = application.args | ({"profile": profile} if profile else {})
            # auto without a cluster: what a machine without GPUs gets
            resolved = check(args, http_host=config.http_options.host, cluster=this_machine())
            console.print(f"[bold]{application.name}[/bold]: profile {resolved.profile} ({escape(resolved.reason)})")
            if find_spec("vllm") is not None:
                check_names_of_vllm(resolved.settings)
            with console.status("reading config.json of target and drafter"):
                report = preflight.run(resolved.settings)
            preflight.show(console, report.findings, report.memory)
            failed |= bool(report.errors)
    except SettingsError as error:
        for problem in error.problems:
            console.print(f"[red]error[/] {escape(problem)}")
        return 1
    except (OSError, ValueError) as error:
        console.print(f"[red]{config_path}:[/red] {escape(str(error))}")
        return 1
    return int(failed)
