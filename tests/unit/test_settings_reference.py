"""docs/settings.md is made from the model."""

from __future__ import annotations

from pathlib import Path

from dflash_serve.settings.model import Settings
from dflash_serve.settings.reference import render_reference

COMMITTED = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_committed_reference_is_up_to_date() -> None:
    assert COMMITTED.read_text() == render_reference(), "python -m dflash_serve.settings.reference > docs/settings.md"


def test_every_setting_is_described() -> None:
    text = render_reference()
    definitions = Settings.model_json_schema()
    for schema in (definitions, *definitions["$defs"].values()):
        for name, value in schema["properties"].items():
            assert value.get("description"), name
            assert f"`{name}`" in text or f"## {name}" in text
