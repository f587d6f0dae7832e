import sys

from dflash_serve.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
