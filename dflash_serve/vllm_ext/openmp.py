"""Intel's OpenMP for the engine on x86 CPUs.

torch brings GNU's, whose barriers cost much where a step is many small parallel regions. vLLM's CPU documentation asks
for Intel's in LD_PRELOAD ("Speculative decoding on CPU without Intel OpenMP ... will cause significant performance
loss", vllm/v1/worker/cpu_worker.py). The extra `cpu` installs it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

LIBRARY = "libiomp5.so"
SPIN = {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
"""Milliseconds that a thread waits awake for the next parallel region, and how. The library's 200 ms take cores from
the server's other processes. vLLM's values when it binds threads itself (vllm/utils/ompmultiprocessing.py)."""


def intel_openmp() -> Path | None:
    """The library of the package intel-openmp; None where it is not installed (Arm, GPU nodes)."""
    try:
        listed = files("intel-openmp") or []
    except PackageNotFoundError:
        return None
    found = [Path(str(file.locate())).resolve() for file in listed if file.name == LIBRARY]
    return found[0] if found and found[0].is_file() else None


def preload_intel_openmp(environment: MutableMapping[str, str]) -> Path | None:
    """Put the library into LD_PRELOAD for processes started from now on; returns it. One that is there stays."""
    library = intel_openmp()
    before = environment.get("LD_PRELOAD", "")
    if library is None or "libiomp" in before:
        return None
    environment["LD_PRELOAD"] = f"{library}:{before}" if before else str(library)
    for name, value in SPIN.items():
        environment.setdefault(name, value)
    return library
