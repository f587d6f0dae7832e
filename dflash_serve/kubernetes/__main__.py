"""Writes the generated parts of k8s/: `python -m dflash_serve.kubernetes`, from the repository's root.

Sources: serve_config.yaml with the profiles, k8s/overlays/*/settings.yaml, monitoring/rules, monitoring/dashboards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dflash_serve.kubernetes import monitoring, serve
from dflash_serve.settings import SettingsError

HEAD = "# Made by `python -m dflash_serve.kubernetes`; a test compares.\n"


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, lists indented, nothing by reference: for readers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """YAML in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def generated(root: Path) -> dict[Path, str]:
    """Every generated file below `root`, the repository, and its text. Raises SettingsError naming the overlay."""
    config = yaml.safe_load((root / "serve_config.yaml").read_text())
    files = {}
    for source in _overlays(root):
        args = yaml.safe_load(source.read_text())
        try:
            files[source.with_name("rayservice.generated.yaml")] = dump(serve.overlay_patch(config, args, dump))
            files[source.with_name("model-job.generated.yaml")] = dump(serve.job_patch(args))
        except SettingsError as error:
            raise SettingsError([f"{source.relative_to(root)}: {problem}" for problem in error.problems]) from None
    rules = {path.name: yaml.safe_load(path.read_text()) for path in _found(root, "rules", "*.yaml")}
    dashboards = {path.stem: json.loads(path.read_text()) for path in _found(root, "dashboards", "*.json")}
    folder = root / "k8s" / "monitoring"
    files[folder / "rules.generated.yaml"] = _documents([monitoring.prometheus_rule(rules)] if rules else [])
    files[folder / "dashboards.generated.yaml"] = _documents(monitoring.dashboard_config_maps(dashboards))
    return {path: HEAD + text for path, text in files.items()}


def _overlays(root: Path) -> list[Path]:
    return sorted((root / "k8s" / "overlays").glob("*/settings.yaml"))


def _found(root: Path, kind: str, pattern: str) -> list[Path]:
    return sorted((root / "monitoring" / kind).glob(pattern))


def _documents(values: Iterable[Any]) -> str:
    return "---\n".join(map(dump, values))


def main(root: Path) -> int:
    try:
        files = generated(root)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in files.items():
        path.write_text(text)
        print(path.relative_to(root))
    for source in _overlays(root):
        for line in serve.unpinned(yaml.safe_load(source.read_text())):
            print(f"warning: {source.relative_to(root)}: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd()))
