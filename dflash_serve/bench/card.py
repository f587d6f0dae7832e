"""What the model card of z-lab/gemma-4-31B-it-DFlash reports: one B300, vLLM, thinking on, greedy, at most 4096 output
tokens, 15 draft tokens."""

from __future__ import annotations

from dataclasses import dataclass

DRAFT_TOKENS = 15
SOURCE = f"model card of z-lab/gemma-4-31B-it-DFlash: one B300, K = {DRAFT_TOKENS}, thinking on"
CONCURRENCIES = (1, 8, 32)


@dataclass(frozen=True)
class Published:
    """Tokens/s without and with DFlash, their ratio as printed, and the acceptance length."""

    autoregressive: float
    dflash: float
    speedup: float
    acceptance_length: float


_TABLE: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "math500": ((77, 447, 5.8, 8.59), (511, 2650, 5.2, 8.59), (1308, 4962, 3.8, 8.62)),
    "gsm8k": ((78, 408, 5.3, 7.53), (520, 2321, 4.5, 7.50), (1382, 4447, 3.2, 7.52)),
    "humaneval": ((76, 420, 5.6, 8.00), (494, 2389, 4.8, 7.89), (1145, 4139, 3.6, 7.96)),
    "mbpp": ((79, 343, 4.4, 6.13), (535, 2036, 3.8, 6.13), (1389, 3636, 2.6, 6.14)),
    "mt_bench": ((79, 236, 3.0, 4.23), (503, 1334, 2.7, 4.19), (1177, 2257, 1.9, 4.19)),
}

TASKS = tuple(_TABLE)

CARD = {
    (task, concurrency): Published(*figures)
    for task, rows in _TABLE.items()
    for concurrency, figures in zip(CONCURRENCIES, rows, strict=True)
}


def acceptance_length(task: str) -> float | None:
    """The card's acceptance length of a task at one request; None for a task that it lacks."""
    published = CARD.get((task, 1))
    return published.acceptance_length if published else None
