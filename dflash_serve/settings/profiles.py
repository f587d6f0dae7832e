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
from dflash_serve.hardware import Cluster, accelerator_named, choose_profile
from dflash_serve.settings.model import Settings
from dflash_serve.settings.parse import SettingsError, parse

AUTO = "auto"
DEFAULTS = "defaults"
BOUND_TO_TARGET = ("model_id", "target_revision", "drafter", "drafter_revision")
"""What a profile says of its own target, and what is wrong for another one."""
MEASURED_WITH_TARGET = ("step_costs", "draft_token_choices")
"""The same under `speculation`."""
SECTIONS = frozenset(
    name for name, field in Settings.model_fields.items() if not field.is_required() and field.default is not None
)


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
        read_config: Gives a model's config.json, None when it is not to be had yet (on the hub, say); raises
            ValueError when the model cannot be used.

    Raises SettingsError with every problem found.
    """
    own = dict(args)
    named = own.pop("profile", AUTO)
    if not isinstance(named, str):
        raise SettingsError([f"profile: must be a name or a path; it is {named!r}"])
    if named == AUTO:
        name, profile, reason = _automatic(own, cluster)
    else:
        name, profile, reason = named, load_profile(named), "named in the configuration"
    settings = parse(_engine_without_nulls(_lay_over(merge(load_profile(DEFAULTS), profile), own)))
    _check_block_size(settings, read_config or local_config)
    return Resolved(settings, name, reason)


def load_profile(name: str) -> dict[str, Any]:
    """A bundled profile by name, or a YAML file by path. Raises SettingsError."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path: Any = Path(name)
    else:
        path = _folder() / f"{name}.yaml"
        if not path.is_file():
            known = [AUTO, *profile_names()]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}, or the path of a YAML file"
            raise SettingsError([f"profile: unknown profile {name!r}; {hint}"])
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            [f"profile: there is no file {name}; give a path that the process which builds the application can read"]
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError([f"profile: cannot read {name}: {why}; mend the file or its permissions"]) from None
    except yaml.YAMLError as error:
        raise SettingsError([f"profile: {name} is not YAML: {error}; mend the file"]) from None
    if not isinstance(values, dict):
        raise SettingsError([f"profile: {name} must hold settings by name, as the bundled profiles do"])
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; anything but a mapping replaces."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def local_config(model: str) -> dict[str, Any] | None:
    """config.json of a bundled or local model; None for one that is elsewhere.

    Raises ValueError when the model is here and has no readable config.json.
    """
    if model == demo.DRAFTER:
        try:
            folder = demo.drafter_path()
        except demo.DemoError as error:
            raise ValueError(str(error)) from None
    else:
        folder = Path(model)
        if not folder.is_dir():
            # on the hub, or on the nodes of the replicas alone
            return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{folder} has no readable config.json; give the folder of a DFlash checkpoint")
    return config


def _automatic(own: Mapping[str, Any], cluster: Cluster) -> tuple[str, dict[str, Any], str]:
    """What `profile: auto` stands for: the profile's name, its values, and the reason."""
    hardware = own.get("hardware")
    wanted = hardware.get("accelerator") if isinstance(hardware, Mapping) else None
    choice = choose_profile(cluster, accelerator_named(wanted) if isinstance(wanted, str) else None)
    if choice.profile is not None:
        return choice.profile, load_profile(choice.profile), choice.reason
    if "target" not in own:
        raise SettingsError(
            [f"profile: auto finds {choice.reason}; name one, or set target and drafter to a pair that fits"]
        )
    return DEFAULTS, {"hardware": {"accelerator": choice.accelerator}}, f"{choice.reason}; target is set"


def _lay_over(profile: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The user's settings on a profile's: another target takes nothing that belongs to the profile's target."""
    base = dict(profile)
    if own.get("target", base.get("target")) != base.get("target"):
        for name in BOUND_TO_TARGET:
            base.pop(name, None)
        if isinstance(base.get("speculation"), Mapping):
            base["speculation"] = {k: v for k, v in base["speculation"].items() if k not in MEASURED_WITH_TARGET}
    elif own.get("drafter", base.get("drafter")) != base.get("drafter"):
        base.pop("drafter_revision", None)
    # a section whose lines are all commented out reads as null
    stated = {key: value for key, value in own.items() if value is not None or key not in SECTIONS}
    return merge(base, stated)


def _engine_without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    engine = values.get("engine")
    if isinstance(engine, Mapping):
        values["engine"] = {name: value for name, value in engine.items() if value is not None}
    return values


def _check_block_size(settings: Settings, read_config: Callable[[str], dict[str, Any] | None]) -> None:
    if not settings.speculates or settings.drafter is None:
        return
    try:
        config = read_config(settings.drafter)
    except ValueError as error:
        raise SettingsError([f"drafter: {error}"]) from None
    problem = None if config is None else block_size_problem(settings, config)
    if problem is not None:
        raise SettingsError([problem])


def block_size_problem(settings: Settings, drafter_config: Mapping[str, Any]) -> str | None:
    """What is wrong with `max_draft_tokens` for a drafter with this config.json; None when it fits."""
    block_size = drafter_config.get("block_size")
    if not isinstance(block_size, int) or block_size < 2:
        return f"drafter: config.json of {settings.drafter} has no block_size; name a DFlash drafter (z-lab format)"
    wanted = settings.speculation.max_draft_tokens
    if wanted < block_size:
        return None
    return (
        f"speculation.max_draft_tokens: {wanted} is more than the drafter's block allows; set {block_size - 1} or less"
    )


def _folder() -> Any:
    return resources.files("dflash_serve") / "profiles"
