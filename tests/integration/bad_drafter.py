"""Drafters made bad on purpose."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dflash_serve import demo


def shuffled_drafter(folder: Path) -> Path:
    """The bundled drafter with what reads the target's hidden states in random order."""
    folder.mkdir(exist_ok=True)
    shutil.copy2(demo.drafter_path() / "config.json", folder)
    weights = load_file(demo.drafter_path() / "model.safetensors")
    order = torch.randperm(weights["fc.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    weights["fc.weight"] = weights["fc.weight"][:, order].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def silent_drafter(folder: Path) -> Path:
    """The bundled drafter with its last norm at zero: it drafts the same token for ever, and no draft is accepted."""
    folder.mkdir(exist_ok=True)
    shutil.copy2(demo.drafter_path() / "config.json", folder)
    weights = load_file(demo.drafter_path() / "model.safetensors")
    weights["norm.weight"] = torch.zeros_like(weights["norm.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
