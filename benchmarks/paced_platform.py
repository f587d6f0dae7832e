"""The platform of `benchmarks.paced_engine`: vLLM imports it to learn what it runs on, before any engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def plugin() -> str:
    """For vLLM's entry point group `vllm.platform_plugins`."""
    return f"{__name__}.{PacedPlatform.__name__}"


class PacedPlatform(CpuPlatform):
    """vLLM's CPU platform with our worker, in the engine's process as on one GPU."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        from benchmarks.paced_engine import InProcessExecutor, PacedWorker

        super().check_and_update_config(vllm_config)
        vllm_config.parallel_config.worker_cls = f"{PacedWorker.__module__}.{PacedWorker.__name__}"
        # vLLM replaces "uni" on CPUs, for OpenMP's sake, by a process of its own that both sides poll
        vllm_config.parallel_config.distributed_executor_backend = InProcessExecutor
