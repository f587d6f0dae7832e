"""Progress of a phase: a bar with the time left on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


class PhaseProgress:
    """Use as a context manager; call `update` as often as you like."""

    def __init__(self, title: str, total: float) -> None:
        self.title, self.total = title, total
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"))
            self.task = self.bar.add_task(title, total=total, note="")

    def __enter__(self) -> "PhaseProgress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, completed: float, note: str = "") -> None:
        """`completed` of `total`; `note` is shown behind it."""
        if self.bar:
            self.bar.update(self.task, completed=completed, note=note)
            return
        now = time.monotonic()
        if now - self.last_line < PLAIN_SECONDS and completed < self.total:
            return
        self.last_line = now
        share = completed / self.total if self.total else 1.0
        left = f"{(now - self.started) * (1 - share) / share:.0f} s left" if share > 0 else "time left unknown"
        print(f"{self.title}: {share:6.1%}, {left}{', ' + note if note else ''}", flush=True)
