"""The GPU worker's part of adaptive speculation over vLLM's CPU worker; see `v2_on_cpu`."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from dflash_serve.vllm_ext.gpu_worker import SkipsDrafting


class AdaptiveV2CPUWorker(SkipsDrafting, CPUWorker):
    pass
