"""CONTRIBUTING.md's layout shows every module, so that a newcomer finds the room for a change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["deployments", "dflash_serve"])
def test_the_layout_is_complete(folder: str) -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    (section,) = re.findall(rf"^{folder}/.*\n((?:  .*\n)+)", layout, re.MULTILINE)
    shown = set(re.findall(r"^  ([\w.]+)", section, re.MULTILINE))
    there = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    there |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert shown == there
