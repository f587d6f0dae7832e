"""What `dflash-serve top` prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dflash_serve.cli import app
from dflash_serve.monitoring.top import ModelView, Row, View, render


def printed(view: View) -> str:
    console = Console(width=110, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(render(view))
    return console.export_text()


ROW = Row("r1", 3, 1, 0.42, 120.5, 2.4, 7.0, 0.31, 0.019)


def test_figures_of_a_replica() -> None:
    text = printed(View((ModelView("m", 1.25, 0.0, 0.1, 1.8, (ROW,), {"01": 0.75, "02": 0.5}),), 2, ()))
    assert "replicas 1 of 2 wanted    alerts none" in text
    assert "requests/s 1.25   errors 0.0%   shed 10.0%   estimated speed-up 1.80x" in text
    cells = next(line for line in text.splitlines() if "r1" in line).split()
    assert cells[1:-1] == ["r1", "3", "1", "42%", "120.5", "2.40", "7.0", "0.31", "s", "0.019", "s"]
    bars = [line.count("█") for line in text.splitlines() if "█" in line]
    assert bars == [18, 12]


def test_what_is_not_known_is_a_dash() -> None:
    row = Row("r1", 0, 0, 0.0, None, None, None, None, None)
    text = printed(View((ModelView("m", None, None, None, None, (row,)),), None, ("DFlashNoMetrics",)))
    assert "of – wanted    alerts DFlashNoMetrics" in text
    assert "estimated speed-up –" in text
    assert "position" not in text


def test_nothing_yet() -> None:
    assert "waiting for metrics" in printed(View((), None, ()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prometheus", "http://127.0.0.1:1"], "no Prometheus at http://127.0.0.1:1"),
        (["--session", "/nowhere"], "no Ray session here"),
    ],
)
def test_nobody_to_ask_is_said_in_a_line(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["top", "--once", *arguments])
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
