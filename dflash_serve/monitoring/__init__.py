"""Rules, dashboards and views made from the catalogue in `dflash_serve.metrics`.

`python -m dflash_serve.monitoring` writes what is made here to monitoring/ and docs/; tests compare.
"""

from pathlib import Path

LATEST_SESSION = Path("/tmp/ray/session_latest")
"""Folder of the Ray session that was last started on this machine."""
