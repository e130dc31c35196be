"""``swiftmoe report RUN...``: one HTML page from the folders of runs and simulations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Folders, and ``--output FILE``; exit status 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="swiftmoe report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train or simulate wrote")
    parser.add_argument("-o", "--output", default="report.html", help="file to write (default: report.html)")
    args = parser.parse_args(argv)
    try:
        from lightning_swiftmoe.report import write_report
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing; install lightning-swiftmoe[report]", file=sys.stderr)
        return 2
    try:
        path = write_report(args.runs, Path(args.output))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB, opens without a network)")
    return 0
