"""`python -m dflash_serve.demo`: makes the bundled pair and prints where it lies."""

from __future__ import annotations

import sys

from dflash_serve.demo import DemoError, drafter_path, ensure_target


def main() -> int:
    try:
        print(f"target  {ensure_target()}")
        print(f"drafter {drafter_path()}")
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
