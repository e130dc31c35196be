"""What the commands on checkpoints share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_swiftmoe.checkpoint.reading import CheckpointError, read_checkpoint


def run_on_file(argv: Sequence[str], usage: str, work: Callable[[Path, dict[str, Any]], int]) -> int:
    """``work`` on the one file that ``argv`` names, and on what it holds.

    Returns:
        The exit status: that of ``work``, 1 for a file that cannot be loaded, 2 for a user's mistake, each in one line.
    """
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
    path = Path(argv[0])
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return work(path, checkpoint)
