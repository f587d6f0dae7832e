"""What this process finds installed and set: the plugin, vLLM's runner, the GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from dflash_serve.preflight.checks import Surroundings

PLUGIN = "dflash_serve"
GENERAL_PLUGINS = "vllm.general_plugins"
LOGITS_PROCESSORS = "vllm.logits_processors"


def surroundings(environment: Mapping[str, str] | None = None) -> Surroundings:
    """Of this process; replicas are taken to have the same."""
    variables = os.environ if environment is None else environment
    return Surroundings(
        has_vllm=find_spec("vllm") is not None,
        plugin_installed=any(found.name == PLUGIN for found in entry_points(group=GENERAL_PLUGINS)),
        plugins_allowed=variables.get("VLLM_PLUGINS"),
        has_logits_processors=bool(entry_points(group=LOGITS_PROCESSORS)),
        runner=variables.get("VLLM_USE_V2_MODEL_RUNNER"),
        gpu_bytes=_gpu_bytes(),
    )


def _gpu_bytes() -> int | None:
    """Memory of this machine's first GPU; None without one."""
    # torch is slow to import, and of no use without a driver
    if not Path("/proc/driver/nvidia/version").exists() or find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
