"""What vLLM imports where its model runs (`worker_extension_cls`): on one device, in the engine's own process."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import engine_steps


class Extension:
    """Adds nothing to vLLM's worker."""


if (folder := os.environ.get(engine_steps.VARIABLE)) is not None:
    engine_steps.install(Path(folder))
