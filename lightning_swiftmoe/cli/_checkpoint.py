"""What the commands on checkpoints share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def run_on_file(argv: Sequence[str], usage: str, work: Callable[[Path], int]) -> int:
    """``work`` on the one file that ``argv`` names; the exit status, 2 for a user's mistake, which is one line."""
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    mistake = None
    if len(argv) != 1:
        mistake = f"expected the path of one checkpoint, got {len(argv)} arguments; {usage}"
    elif not Path(argv[0]).is_file():
        mistake = f"there is no file {argv[0]}; {usage}"
    if mistake is not None:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return work(Path(argv[0]))
