"""docs/settings.md, made from the model and the bundled profiles: `python -m dflash_serve.settings.reference`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dflash_serve.settings.model import Settings
from dflash_serve.settings.parse import OWNED_ENGINE_ARGUMENTS
from dflash_serve.settings.profiles import DEFAULTS, load_profile, profile_names

_HEAD = """# Settings

<!-- Made by `python -m dflash_serve.settings.reference > docs/settings.md`; a test compares. -->

What may stand under `args` of an application in `serve_config.yaml`. Only `profile` is needed, and it may be left out:

```yaml
args:
  profile: auto
  limits:
    max_output_tokens: 512
```

Values come from three layers, each laid over the one before: the defaults below, the profile, and what stands under
`args`. Mappings merge; anything else replaces. An unknown name or a wrong value stops the deployment with a message
that names the setting. Secrets do not belong here: API keys come from an environment variable or a file (`auth`), a
hub token from `HF_TOKEN`.

## profile

`auto` (default) takes the bundled profile for `hardware.accelerator`, where that is set, else for the GPUs that the
cluster has when the application is built, else `smollm2-cpu`. Name a profile where GPU nodes join only on demand. A
path (with a `/`, or ending in `.yaml`) names a file of one's own, written like the bundled ones in
`dflash_serve/profiles/`.
"""


def render_reference() -> str:
    """The settings as Markdown."""
    schema = Settings.model_json_schema()
    sections = {name: _definition(schema, value) for name, value in schema["properties"].items() if "$ref" in value}
    top = {name: value for name, value in schema["properties"].items() if name not in sections}
    parts = [_HEAD, "## Model and engine\n", _table(top)]
    for name, section in sections.items():
        parts += [f"## {name}\n", schema["properties"][name]["description"] + "\n", _table(section["properties"])]
    parts += ["## What the profiles set\n", _profiles()]
    parts += ["## Engine arguments that are refused\n", _refused()]
    return "\n".join(parts)


def _definition(schema: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    definition: dict[str, Any] = schema["$defs"][value["$ref"].rsplit("/", 1)[-1]]
    return definition


def _table(properties: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, value in properties.items():
        default = _code(value["default"]) if "default" in value else "from the profile"
        description = " ".join(value["description"].split())
        rows.append(f"| `{name}` | {_type(value)} | {default} | {description} |")
    return "\n".join(rows) + "\n"


def _type(value: Mapping[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_type(option) for option in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    name = {"object": "mapping", "string": "text"}.get(value["type"], value["type"])
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">")):
        if key in value:
            name += f" {sign} {value[key]:g}" if isinstance(value[key], float) else f" {sign} {value[key]}"
    return name


def _profiles() -> str:
    names = [DEFAULTS, *profile_names()]
    columns = [dict(_leaves(load_profile(name))) for name in names]
    rows = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for path in dict.fromkeys(path for column in columns for path in column):
        cells = (_code(column[path]) if path in column else "" for column in columns)
        rows.append(f"| `{path}` | {' | '.join(cells)} |")
    note = f"`{DEFAULTS}` is below every profile, also one of your own.\n\n"
    return note + "\n".join(rows) + "\n"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return leaves


def _refused() -> str:
    return "".join(f"- `{name}`: {mend}\n" for name, mend in OWNED_ENGINE_ARGUMENTS.items())


def _code(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    print(render_reference(), end="")
