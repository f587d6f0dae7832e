"""Writes rules, dashboards and their references: `python -m dflash_serve.monitoring`."""

from __future__ import annotations

from pathlib import Path

from dflash_serve.monitoring import dashboards, reference, rules

ROOT = Path(__file__).parents[2]


def rendered() -> dict[str, str]:
    """Path from the repository's root -> content of every file that is made here."""
    parameters = rules.read_parameters()
    files = {f"monitoring/rules/{name}": rules.render(content) for name, content in rules.groups(parameters).items()}
    files |= {f"monitoring/dashboards/{name}": content for name, content in dashboards.render().items()}
    return files | {
        "docs/metrics.md": reference.render_metrics(),
        "docs/alerts.md": reference.render_alerts(parameters),
    }


def main() -> None:
    for name, content in rendered().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
