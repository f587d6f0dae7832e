"""The terminal while it runs: the table so far, and a bar with the time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dflash_serve.bench.samples import Sample
from dflash_serve.bench.summary import AUTOREGRESSIVE, Row, summarise
from dflash_serve.bench.table import CHIEF_COLUMNS, COLUMNS, cells

UNLIMITED = 240
"""Columns of output that goes to a file."""


def make_console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


class View:
    """A context manager; without a terminal it prints a line for each thing that it does."""

    def __init__(self, console: Console, baseline: str = AUTOREGRESSIVE) -> None:
        self._console = console
        self._baseline = baseline
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = self._progress.add_task("")
        self._live = Live(self._progress, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> View:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def total(self, conversations: int) -> None:
        self._progress.update(self._bar, total=conversations)

    def doing(self, what: str) -> None:
        self._progress.update(self._bar, description=what)
        if not self._console.is_terminal:
            task = self._progress.tasks[self._bar]
            self._console.print(f"{task.completed:.0f}/{task.total or 0:.0f} {what}", highlight=False)

    def advance(self) -> None:
        self._progress.advance(self._bar)

    def note(self, text: str) -> None:
        self._console.print(text)

    def show(self, samples: Sequence[Sample]) -> None:
        rows = summarise(samples, self._baseline)
        # what is being measured stays in sight where the table is longer than the screen
        room = max(self._console.size.height - 8, 5)
        self._live.update(Group(fitting_table(rows[-room:], self._console), self._progress))


def fitting_table(rows: Sequence[Row], console: Console) -> Table:
    """All columns, or where the terminal is too narrow for them the chief ones, without spread."""
    whole = table(rows, COLUMNS)
    wanted = console.measure(whole, options=console.options.update(max_width=UNLIMITED)).maximum
    return whole if wanted <= console.width else table(rows, CHIEF_COLUMNS)


def table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    result = Table()
    for title in columns:
        result.add_column(title, justify="left" if title in ("task", "side") else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        texts = dict(zip(COLUMNS, cells(row), strict=True))
        shown = [texts[title] if columns == COLUMNS else texts[title].split(" (")[0] for title in columns]
        result.add_row(*shown, end_section=following is not None and following.task != row.task)
    return result
