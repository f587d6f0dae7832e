"""What `benchmarks.front_end_paced`, its engine, which imports vLLM, and `benchmarks.host_speed` have in common."""

from __future__ import annotations

PACE = "gemma4-31b-h200"
"""The surface of step costs whose steps are slept through."""
BUSY_VARIABLE = "DFLASH_PACED_BUSY"
"""Set: steps that read a prompt keep the CPU busy instead."""
BUSY_OPERATIONS = 12000
"""Of a tensor of 256 numbers each: a step that the CPU paces, as it does a GPU's that has little to compute for each of
many launches. Some 40 ms."""


def keep_busy() -> None:
    """Take `BUSY_OPERATIONS`' time of the CPU, in Python and torch, in the calling thread."""
    import torch

    numbers = torch.ones(16, 16)
    for _ in range(BUSY_OPERATIONS // 2):
        numbers = (numbers + 1) * 0.5
