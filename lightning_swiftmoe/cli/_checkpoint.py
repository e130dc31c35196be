"""What the commands on checkpoints share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_swiftmoe.checkpoint.folder import check_folder
from lightning_swiftmoe.checkpoint.reading import CheckpointError, read_checkpoint
from lightning_swiftmoe.checkpoint.sharded_reading import SavedOptimizer, read_folder


def run_on_checkpoint(argv: Sequence[str], usage: str, work: Callable[[Path, dict[str, Any]], int]) -> int:
    """``work`` on the one checkpoint that ``argv`` names, a file or a folder, and on what it holds.

    Of optimizer state in a folder ``work`` sees shapes and types alone.

    Returns:
        The exit status: that of ``work``, 1 for a checkpoint that cannot be loaded, 2 for a user's mistake, each in one
        line.
    """
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    mistake = None
    if len(argv) != 1:
        mistake = f"expected the path of one checkpoint, got {len(argv)} arguments; {usage}"
    elif not Path(argv[0]).exists():
        mistake = f"there is no checkpoint {argv[0]}; {usage}"
    if mistake is not None:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    path = Path(argv[0])
    try:
        checkpoint = read(path)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return work(path, checkpoint)


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, a file or a folder.

    Raises:
        CheckpointError: it is not whole, was changed, or holds more than data.
        OSError: the file system does not give it.
    """
    if not path.is_dir():
        return read_checkpoint(path)
    check_folder(path)
    checkpoint = read_folder(path)
    states: list[SavedOptimizer] = checkpoint.get("optimizer_states", [])
    return {**checkpoint, "optimizer_states": [state.described() for state in states]}
