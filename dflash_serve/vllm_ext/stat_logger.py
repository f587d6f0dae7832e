"""A vLLM stat logger that keeps acceptance statistics and load of the engine in this process.

vLLM makes one in every process that runs an `AsyncLLM` (entry point group `vllm.stat_logger_plugins`, upstream file
vllm/v1/metrics/loggers.py) and calls it once per engine step. The deployment reads `engine_stats()` and exports it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from dflash_serve.speculation.acceptance import AcceptanceCounts, AcceptanceWindow
from dflash_serve.speculation.report import read_report

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

DEFAULT_WINDOW_SECONDS = 60.0


@dataclass
class EngineStats:
    """State of the engine in this process after its last step."""

    window: AcceptanceWindow = field(default_factory=lambda: AcceptanceWindow(DEFAULT_WINDOW_SECONDS))
    total: AcceptanceCounts = field(default_factory=AcceptanceCounts)
    running_requests: int = 0
    waiting_requests: int = 0
    kv_cache_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    draft_length_report: Path | None = None
    """Where the engine's process tells of the draft lengths that it chooses; see dflash_serve.speculation.report."""

    def acceptance_length(self) -> float | None:
        """Tokens per verification over the window; None when nothing was verified in it."""
        return self.window.counts(time.monotonic()).acceptance_length

    def draft_length(self) -> dict[str, Any] | None:
        """The last report; None when the draft length is not chosen, or not yet."""
        return read_report(self.draft_length_report) if self.draft_length_report else None


_stats = EngineStats()


def engine_stats() -> EngineStats:
    """The statistics of the engine in this process; all zero when none has stepped."""
    return _stats


class AcceptanceStatLogger(StatLoggerBase):
    """Feeds `engine_stats()`."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._stats = engine_stats()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None:
            return
        self._stats.running_requests = scheduler_stats.num_running_reqs
        self._stats.waiting_requests = scheduler_stats.num_waiting_reqs
        self._stats.kv_cache_usage = scheduler_stats.kv_cache_usage
        step = scheduler_stats.spec_decoding_stats
        if step is None:
            return
        counted = (
            step.num_drafts,
            step.num_draft_tokens,
            step.num_accepted_tokens,
            step.num_accepted_tokens_per_pos,
        )
        self._stats.total.add(*counted, step.num_draft_tokens_per_pos)
        self._stats.window.add(time.monotonic(), *counted)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the engine logs its own start."""
