"""Findings and the memory estimate on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dflash_serve.preflight.checks import GIB, Finding
from dflash_serve.preflight.memory import Estimate

KIB = 1024
COLOURS = {"error": "red", "warning": "yellow"}


def show(console: Console, findings: Sequence[Finding], memory: Estimate | None) -> None:
    """Print both."""
    if memory is not None:
        console.print(memory_table(memory))
        console.print(requests_table(memory))
    for finding in findings:
        console.print(f"[{COLOURS[finding.severity]}]{finding.severity}[/] {escape(str(finding))}", soft_wrap=True)
    if not findings:
        console.print("[green]nothing found[/]")


def memory_table(memory: Estimate) -> Table:
    table = Table(title="One GPU, by config.json", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in (
        ("weights of the target", memory.weights_bytes),
        ("weights of the drafter", memory.drafter_bytes),
        ("activations, logits, graphs", memory.working_bytes),
        ("left for the KV cache", memory.kv_bytes),
        ("all that vLLM may use", memory.usable_bytes),
        ("the GPU", memory.gpu_bytes),
    ):
        table.add_row(name, f"{size / GIB:.1f}")
    return table


def requests_table(memory: Estimate) -> Table:
    kib_per_token, windows_gib = memory.kv_bytes_per_token / KIB, memory.window_bytes / GIB
    title = f"KV cache: {kib_per_token:.0f} KiB a token, windows {windows_gib:.2f} GiB"
    table = Table(title=title, title_justify="left")
    for name in ("tokens", "GiB to decode", "GiB to start", "requests that fit"):
        table.add_column(name, justify="right")
    for fit in memory.fits:
        table.add_row(
            f"{fit.tokens}", f"{fit.held_bytes / GIB:.2f}", f"{fit.admitted_bytes / GIB:.2f}", f"{fit.requests}"
        )
    return table
