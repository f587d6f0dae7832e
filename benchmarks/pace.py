"""What `benchmarks.front_end_paced` and its engine, which imports vLLM, have in common."""

from __future__ import annotations

PACE = "gemma4-31b-h200"
"""The surface of step costs whose steps are slept through."""
BUSY_VARIABLE = "DFLASH_PACED_BUSY"
"""Set: steps that read a prompt keep the CPU busy instead."""
