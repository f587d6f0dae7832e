"""What the controller tells the metrics: it lives in the engine's process, they are exported from the replica's.

vLLM hands its own statistics over and has no room for others, so ours go through a small file.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

REPORT_VARIABLE = "DFLASH_DRAFT_LENGTH_REPORT"
"""Environment variable of the engine's process: the file to write."""
REPORT_SECONDS = 1.0
STALE_SECONDS = 5.0
"""A report older than this says nothing of the present."""


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Replace the file; a reader sees the old report or the new one."""
    beside = path.with_suffix(".new")
    try:
        beside.write_text(json.dumps(report | {"written": time.time()}))
        beside.replace(path)
    except OSError:
        # a full disk must not stop the engine; the metrics go stale
        return


def read_report(path: Path) -> dict[str, Any] | None:
    """The last report, with `fresh` telling whether it is of the present; None when there is none."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return report | {"fresh": time.time() - report["written"] < STALE_SECONDS}
