"""Reports as a reader gets them, and what the command refuses."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dflash_serve.bench.overhead import HIGH_THROUGHPUT, VLLM
from dflash_serve.bench.report import OVERHEAD, RUN, Report, markdown, write
from dflash_serve.bench.samples import Request, Sample
from dflash_serve.bench.servers import ServerError
from dflash_serve.bench.summary import summarise
from dflash_serve.bench.table import CHIEF_COLUMNS, COLUMNS
from dflash_serve.bench.view import UNLIMITED, fitting_table
from dflash_serve.cli import app
from dflash_serve.speculation.acceptance import AcceptanceCounts


def measured() -> list[Sample]:
    samples = []
    for side, seconds in (("AR", 20.0), ("K=3", 8.0)):
        for number in (0, 1):
            requests = [Request(10, 101, 0.5, seconds - 1)]
            sample = Sample(side, "gsm8k", 8, number, seconds + number, requests, "a-model")
            sample.gaps.add_all([0.1] * 50)
            sample.client_cpu_share, sample.other_cores = 0.8, float(number)
            if side != "AR":
                sample.acceptance, sample.acceptance_source = AcceptanceCounts(40, 120, 60, [30, 20, 10]), "responses"
            samples.append(sample)
    return samples


def test_a_report_holds_the_cards_figures_beside_ours_and_is_made_from_its_json(tmp_path: Path) -> None:
    report = Report(RUN, {"date": "2026-01-01", "hardware": "<a machine>"}, True, "AR", measured())
    kept = json.dumps(report.to_json())
    (tmp_path / "one.json").write_text(kept)
    result = CliRunner().invoke(app, ["bench", "report", str(tmp_path / "one.json"), "--out", str(tmp_path / "two")])
    assert result.exit_code == 0, result.output
    pictures = [f"two-{name}.png" for name in ("speedup", "acceptance", "latency")]
    written = {"two.json", "two.md", "two.html", *pictures, *(name.replace("png", "svg") for name in pictures)}
    assert written == {path.name for path in tmp_path.glob("two*")}
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads(kept)
    text = (tmp_path / "two.md").read_text()
    assert text == markdown(report, pictures)
    assert text.startswith("# Synthetic: DFlash benchmark, 2026-01-01")
    assert "acceptance is forced" in text
    assert "- model: a-model" in text
    assert "load generator was busy 80%" in text
    assert "DISTURBED: something else on the machine kept 0.5 cores busy on average, 1.0 in one cell" in text
    assert "BUNCHED" not in text
    # 101 tokens in 8 and 9 s, against 20 and 21 s; the card says 4.5 and 7.50 at 8 requests
    row = next(line for line in text.splitlines() if "| K=3 |" in line)
    cells = ["11.9 (11.2–12.6)", "2.42 (2.33–2.50)", "4.5", "2.50", "7.50", "3.0"]
    assert [cell.strip() for cell in row.split("|")[4:10]] == cells
    assert "| 8 | gsm8k | 520 | 2321 | 4.5 | 7.50 |" in text
    page = (tmp_path / "two.html").read_text()
    assert page.count("<svg") == 3
    assert "&lt;a machine&gt;" in page


def test_a_report_tells_where_events_were_read_in_bunches() -> None:
    samples = measured()
    samples[1].gaps.add_all([0.00001] * 9 + [0.0002] * 30)
    samples[3].gaps.add_all([0.00001] * 150)
    text = markdown(Report(RUN, {"date": "2026-01-01"}, False, "AR", samples), [])
    assert "BUNCHED: in 2 of 4 samples more than a tenth of the events" in text
    assert "(75% in one)" in text
    samples[1].gaps.add_all([0.1] * 2)
    assert "BUNCHED: in 1 of 4 samples" in markdown(Report(RUN, {"date": "2026-01-01"}, False, "AR", samples), [])


def test_a_report_tells_where_sides_had_other_prompts() -> None:
    def text(*second_turns: int, error: str | None = None) -> str:
        """Of K=3, prompt tokens at 1 and at 8 requests; AR has 120."""
        samples = [
            Sample("K=3" if drafted else "AR", "mt_bench", concurrency, 0, 9.0, [Request(80, 9, 0.5, 8.0), second])
            for concurrency, tokens in zip((1, 8), second_turns, strict=True)
            for drafted in (False, True)
            for second in [Request(tokens if drafted else 120, 9, 0.5, 8.0, error if drafted else None)]
        ]
        return markdown(Report(RUN, {"date": "2026-01-01"}, False, "AR", samples), [])

    assert "UNEQUAL" not in text(138, 102)
    assert "UNEQUAL: in 1 of 2 comparisons prompts differ by more than a tenth" in text(120, 160)
    assert "in 1 of 2 comparisons" in text(60, 120)
    most = "the most: 220 tokens for K=3 and 100 for AR on average, mt_bench, 1 at once. "
    assert most in text(360, 160)
    # the turn that would have been long is missing
    assert "UNEQUAL" not in text(360, 160, error="it fell over")
    # no usage
    samples = [Sample(side, "t", 1, 0, 9.0, [Request(n, 9, 0.5, 8.0)]) for side, n in (("AR", 80), ("K=3", 0))]
    assert "UNEQUAL" not in markdown(Report(RUN, {"date": "2026-01-01"}, False, "AR", samples), [])


def test_a_report_leaves_out_times_that_streams_did_not_show(tmp_path: Path) -> None:
    samples = [
        Sample(side, "random", 8, 0, seconds, [Request(10, 101, None, seconds)])
        for side, seconds in ((VLLM, 10.0), (HIGH_THROUGHPUT, 10.1))
    ]
    written = write(Report(OVERHEAD, {"date": "2026-01-01"}, False, VLLM, samples), tmp_path / "cost")
    assert {path.name for path in written if path.suffix == ".png"} == {"cost-ratio.png"}
    text = (tmp_path / "cost.md").read_text()
    assert "left out where streams did not show them" in text
    assert "| 8 | up | 10.0 | 0.990 |  |  |  |  |  |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "give --url of a server that runs, or --pair"),
        (["run", "--pair", "--url", "http://x/v1"], "give --url of a server that runs, or --pair"),
        (["run", "--url", "http://x/v1", "--synthetic"], "--synthetic: works with --pair alone"),
        (["run", "--url", "http://x/v1", "--sides", "ar,k=7"], "--sides: works with --pair alone"),
        (["run", "--pair", "--metrics-url", "http://x/metrics"], "--metrics-url: works with --url alone"),
        (["run", "--pair", "--tasks", "sample", "--sides", "ar,k"], "--sides: no side 'k'; there are ar, dflash,"),
        (["run", "--pair", "--tasks", "sample", "--concurrency", "1,x"], "--concurrency: must be whole numbers"),
        (["run", "--pair", "--tasks", "gsm9k"], "--tasks: no task 'gsm9k'"),
        (["run", "--url", "http://127.0.0.1:9/v1", "--tasks", "sample"], "http://127.0.0.1:9/v1/models"),
        (["overhead", "--settings", "/nowhere.yaml"], "--settings: /nowhere.yaml"),
        (["report", "/nowhere.json"], "/nowhere.json: No such file or directory"),
        (["report", str(Path(__file__).parents[3] / "pyproject.toml")], "pyproject.toml: not a report of"),
        (["run", "--pair", "--tasks", "sample", "--synthetic"], "--synthetic: the card has no acceptance length for"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "sides", "cells"),
    [
        (["run", "--pair", "--sides", "ar,k=3"], ("AR", "K=3"), 2),
        (["overhead"], ("vllm serve", "up"), 2),
        (["overhead", "--interleave"], ("vllm serve", "up"), 1),
    ],
)
def test_what_was_measured_is_kept_while_the_next_is(
    command: list[str], sides: tuple[str, str], cells: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lest a run that is killed leave nothing."""
    out = tmp_path / "deeper" / "bench"
    kept: list[Report] = []

    @contextlib.contextmanager
    def server(*_: object, **__: object) -> Iterator[Any]:
        process = SimpleNamespace(pid=None)
        yield SimpleNamespace(url="http://x", start_seconds=1.0, cpu_seconds=None, process=process)

    async def ready(_: object, endpoint: object, *__: object) -> object:
        return endpoint

    async def measure(*_: object, side: str, **__: object) -> Sample:
        if side == sides[1]:
            kept.append(Report.read(out.with_suffix(".json")))
            raise ServerError("it fell over:\nlog")
        return next(sample for sample in measured() if sample.side == "AR")

    monkeypatch.setattr("dflash_serve.bench.report._gpus", lambda: [])
    monkeypatch.setattr("dflash_serve.bench.run.suspended", contextlib.nullcontext)
    for name in ("run.dflash_server", "overhead.dflash_server", "overhead.vllm_server"):
        monkeypatch.setattr(f"dflash_serve.bench.{name}", server)
    for name, fake in (("prepare", ready), ("warm_up", ready), ("measure", measure)):
        monkeypatch.setattr(f"dflash_serve.bench.run.{name}", fake)
    tasks = ["--tasks", "sample"] if command[0] == "run" else ["--sides", "vllm,up"]
    settings = tmp_path / "settings.yaml"
    settings.write_text("profile: smollm2-cpu\n")
    arguments = [*command, *tasks, "--concurrency", "1,8", "--settings", str(settings), "--out", str(out)]
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert "it fell over" in result.output
    (report,) = kept
    assert len(report.samples) == cells
    assert ("interleaved" in report.about.get("sides", "")) == ("--interleave" in command)
    assert report.about["not complete"] == "killed, or still at it"
    ended = Report.read(out.with_suffix(".json"))
    assert ended.about == report.about | {"not complete": "it fell over"}
    assert {path.suffix for path in out.parent.iterdir()} >= {".json", ".md", ".html"}
    assert not list(out.parent.glob("*.part"))


def test_a_narrow_terminal_shows_the_chief_columns_whole() -> None:
    rows = summarise(measured())
    for width, shown in ((80, CHIEF_COLUMNS), (UNLIMITED, COLUMNS)):
        console = Console(width=width, file=io.StringIO(), force_terminal=True)
        with console.capture() as text:
            console.print(fitting_table(rows, console))
        assert "…" not in text.get()
        assert all(title in text.get() for title in shown)
