"""Rules, dashboards and views made from the catalogue in `dflash_serve.metrics`.

`python -m dflash_serve.monitoring` writes what is made here to monitoring/ and docs/; tests compare.
"""

import os
import sys
from pathlib import Path


def latest_session() -> Path:
    """Folder of the Ray session that was last started on this machine with this environment."""
    # as Ray has it, which heeds TMPDIR on Linux alone
    folder = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None)
    return Path(folder or "/tmp") / "ray" / "session_latest"
