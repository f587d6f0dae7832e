"""Where settings come from: defaults, a profile (chosen or named), then the user's own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dflash_serve import demo
from dflash_serve.settings.model import Settings, SettingsError, parse

AUTO = "auto"
DEFAULTS = "defaults"
CPU_PROFILE = "smollm2-cpu"
PROFILE_OF_GPU = {"B300": "gemma4-31b-b300", "B200": "gemma4-31b-b200", "H200": "gemma4-31b-h200"}
"""Ray's accelerator type -> profile, best first: the order in which `auto` looks."""


@dataclass(frozen=True)
class Cluster:
    """What the Ray cluster offers now."""

    cpus: float
    gpus: Mapping[str, int]
    """Accelerator type -> GPUs of it; the type is "" for GPUs that Ray cannot name."""


@dataclass(frozen=True)
class Resolved:
    """Settings, and where they came from."""

    settings: Settings
    profile: str
    reason: str
    """Why this profile, for the log."""


def profile_names() -> list[str]:
    """The bundled profiles."""
    return sorted(path.stem for path in _folder().iterdir() if path.suffix == ".yaml" and path.stem != DEFAULTS)


def resolve(
    args: Mapping[str, Any], cluster: Cluster, *, read_config: Callable[[str], dict[str, Any] | None] | None = None
) -> Resolved:
    """Settings for `args` on `cluster`.

    Args:
        args: What stands under `args` in serve_config.yaml.
        cluster: What there is, for `profile: auto`.
        read_config: Gives a model's config.json, None when it is not to be had yet (on the hub, say).

    Raises SettingsError with every problem found.
    """
    own = dict(args)
    named = own.pop("profile", AUTO)
    if not isinstance(named, str):
        raise SettingsError([f"profile: must be a name or a path; it is {named!r}"])
    name, reason = (
        choose_profile(cluster, has_target="target" in own) if named == AUTO else (named, "named in the configuration")
    )
    values = merge(merge(_load(DEFAULTS), _load(name)), own)
    settings = parse(values)
    _check_block_size(settings, read_config or local_config)
    return Resolved(settings, name, reason)


def choose_profile(cluster: Cluster, *, has_target: bool) -> tuple[str, str]:
    """The profile for what the cluster offers, and the reason in words.

    Raises SettingsError when there are GPUs that no profile knows and the configuration names no target either.
    """
    for accelerator, profile in PROFILE_OF_GPU.items():
        if cluster.gpus.get(accelerator):
            return profile, f"the cluster has {cluster.gpus[accelerator]} x {accelerator}"
    if any(cluster.gpus.values()):
        have = ", ".join(f"{count} x {kind or 'unknown GPU'}" for kind, count in cluster.gpus.items() if count)
        if has_target:
            return DEFAULTS, f"the cluster has {have}, for which no profile is bundled; target is set"
        raise SettingsError(
            [
                f"profile: auto finds {have} and no profile for it (there are {', '.join(PROFILE_OF_GPU)}); "
                "name a profile, or set target, drafter and hardware.accelerator"
            ]
        )
    return CPU_PROFILE, f"the cluster has no GPU ({cluster.cpus:g} CPUs)"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; anything but a mapping replaces."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def local_config(model: str) -> dict[str, Any] | None:
    """config.json of a bundled or local model; None for one on the hub or in a bucket."""
    if model == demo.DRAFTER:
        folder = demo.drafter_path()
    elif Path(model).is_dir():
        folder = Path(model)
    else:
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _check_block_size(settings: Settings, read_config: Callable[[str], dict[str, Any] | None]) -> None:
    if not settings.speculates or settings.drafter is None:
        return
    config = read_config(settings.drafter)
    most = config["block_size"] - 1 if config and "block_size" in config else None
    wanted = settings.speculation.num_draft_tokens
    if most is not None and wanted > most:
        raise SettingsError(
            [f"speculation.num_draft_tokens: {wanted} is more than the drafter's block allows; set {most} or less"]
        )


def _folder() -> Any:
    return resources.files("dflash_serve") / "profiles"


def _load(name: str) -> dict[str, Any]:
    """A bundled profile by name, or a YAML file by path."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path: Any = Path(name)
        if not path.is_file():
            raise SettingsError([f"profile: there is no file {name}; give its path from the folder of the process"])
    else:
        path = _folder() / f"{name}.yaml"
        if not path.is_file():
            known = [AUTO, *profile_names()]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}, or the path of a YAML file"
            raise SettingsError([f"profile: unknown profile {name!r}; {hint}"])
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SettingsError([f"profile: {name} is not YAML: {error}"]) from None
    if not isinstance(values, dict):
        raise SettingsError([f"profile: {name} must hold settings by name"])
    return values
