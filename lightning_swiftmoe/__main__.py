"""``python -m lightning_swiftmoe`` is ``swiftmoe``."""

import sys

from lightning_swiftmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
