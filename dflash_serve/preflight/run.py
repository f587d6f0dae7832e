"""All checks of one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dflash_serve import demo
from dflash_serve.hardware import GPU_MEMORY_GB
from dflash_serve.preflight.checks import Finding, Surroundings, check
from dflash_serve.preflight.installed import surroundings
from dflash_serve.preflight.memory import Estimate, estimate
from dflash_serve.preflight.sources import Unavailable, read_config
from dflash_serve.settings.model import Settings
from dflash_serve.settings.profiles import block_size_problem


@dataclass(frozen=True)
class Report:
    """What was found."""

    findings: list[Finding]
    memory: Estimate | None
    """None on CPU, for a GPU of unknown size, or without the target's config.json."""

    @property
    def errors(self) -> list[str]:
        return [str(finding) for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[str]:
        return [str(finding) for finding in self.findings if finding.severity == "warning"]


def run(settings: Settings, here: Surroundings | None = None) -> Report:
    """Check `settings` here; reads both models' config.json, from the hub or a bucket if need be."""
    here = here or surroundings()
    findings: list[Finding] = []
    target = _config("target", settings.target, settings.target_revision, findings)
    drafter = None
    if settings.speculates and settings.drafter is not None:
        drafter = _config("drafter", settings.drafter, settings.drafter_revision, findings)
        problem = block_size_problem(settings, drafter) if drafter is not None else None
        if problem is not None:
            field, _, rest = problem.partition(": ")
            findings.append(Finding("error", field, *rest.rsplit("; ", 1)))
    memory = _memory(settings, target, drafter, here)
    return Report(sorted(findings, key=lambda f: f.severity) + check(settings, target, drafter, here, memory), memory)


def _config(field: str, model: str, revision: str | None, findings: list[Finding]) -> dict[str, Any] | None:
    if model == demo.TARGET:
        # it may not be made yet, and is known to fit
        return None
    try:
        return read_config(model, revision)
    except Unavailable as error:
        problem, _, mend = str(error).partition("; ")
        findings.append(Finding("warning", field, problem, mend or "the checks that need its config.json are left out"))
    except ValueError as error:
        problem, _, mend = str(error).partition("; ")
        findings.append(Finding("error", field, problem, mend))
    return None


def _memory(
    settings: Settings, target: dict[str, Any] | None, drafter: dict[str, Any] | None, here: Surroundings
) -> Estimate | None:
    if target is None or settings.hardware.is_cpu or (settings.speculates and drafter is None):
        return None
    size_gb = GPU_MEMORY_GB.get(settings.hardware.accelerator)
    gpu_bytes = here.gpu_bytes or (size_gb * 10**9 if size_gb else None)
    try:
        return estimate(settings, target, drafter, gpu_bytes) if gpu_bytes else None
    except KeyError:
        # a config.json that names its sizes otherwise
        return None
