"""What would start and then be slow, wrong or unsafe, said before it starts.

`run` puts it together: `sources` gets each model's config.json, `installed` says what is here, `checks` judges,
`memory` estimates, `report` shows. `checks`, `memory` and `shapes` are pure.
"""

from dflash_serve.preflight.checks import Finding
from dflash_serve.preflight.report import show
from dflash_serve.preflight.run import Report, run

__all__ = ["Finding", "Report", "run", "show"]
