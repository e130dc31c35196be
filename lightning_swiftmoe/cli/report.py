"""``swiftmoe report RUN...``: one HTML page from the folders of runs, sweeps and simulations.

Runs of a recipe of the paper (``paper:`` in their config) also give its table, printed and written beside the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Folders, and ``--output FILE``; exit status 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="swiftmoe report", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train or simulate wrote, or of a sweep")
    parser.add_argument("-o", "--output", default="report.html", help="file to write (default: report.html)")
    parser.add_argument(
        "--target-loss",
        type=float,
        metavar="X",
        help="count steps to it in tables of the paper (default: the lowest loss that every run reached)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="look at the first N steps of training runs only")
    args = parser.parse_args(argv)
    try:
        from lightning_swiftmoe.report import (
            first_steps,
            load_runs,
            load_tables,
            minutes_tables,
            paper_tables,
            without_runs,
            write_page,
        )
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing; install lightning-swiftmoe[report]", file=sys.stderr)
        return 2
    try:
        if args.steps is not None and args.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {args.steps}")
        left_out = without_runs(args.runs)
        folders = [path for path in args.runs if path not in left_out]
        if left_out and folders:
            print(f"left out, no run there: {', '.join(left_out)}", file=sys.stderr)
        runs = load_runs(folders or args.runs)
        if args.steps is not None:
            runs = [first_steps(run, args.steps) for run in runs]
        tables = [*paper_tables(runs, args.target_loss), *minutes_tables(runs, args.target_loss)]
        tables += load_tables(folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = write_page(runs, tables, args.output).absolute()
    if tables:
        text = "\n".join(table.markdown() for table in tables)
        beside = path.with_suffix(".md")
        beside.write_text(text, encoding="utf-8")
        print(f"{text}\nwrote {beside}")
    print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB, opens without a network)")
    return 0


def write_report_of(folder: Path) -> str | None:
    """``report.html`` in the folder of a run that just ended; what to say where Jinja2 is not installed."""
    try:
        from lightning_swiftmoe.report import write_report
    except ModuleNotFoundError as error:
        return f"no report.html: {error.name} is missing; install lightning-swiftmoe[report]"
    write_report([folder], folder / "report.html")
    return None
