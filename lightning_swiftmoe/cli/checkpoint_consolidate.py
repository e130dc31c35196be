"""``swiftmoe checkpoint consolidate FOLDER FILE``: a sharded checkpoint as one file, which every Trainer loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_swiftmoe.checkpoint.folder import check_folder
from lightning_swiftmoe.checkpoint.io import WholeCheckpointIO
from lightning_swiftmoe.checkpoint.reading import CheckpointError
from lightning_swiftmoe.checkpoint.sharded_reading import read_folder
from lightning_swiftmoe.cli.tables import size

USAGE = "usage: swiftmoe checkpoint consolidate FOLDER FILE"


def main(argv: Sequence[str]) -> int:
    """Exit status 0 for a file written, 1 for a folder that cannot be loaded or a full disk, 2 for a user's mistake."""
    if {"-h", "--help"} & set(argv):
        print(f"{USAGE}\n\nThe file is what checkpoint='full' would have saved; the whole model must fit into memory.")
        return 0
    if mistake := _mistake(argv):
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    folder, file = map(Path, argv)
    try:
        consolidate(folder, file)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{file}: {size(file.stat().st_size)}")
    return 0


def consolidate(folder: Path, file: Path) -> None:
    """Write the content of ``folder`` to ``file``.

    Raises:
        CheckpointError: the folder is not whole, was changed, or holds more than data.
        OSError: the file cannot be written.
    """
    check_folder(folder)
    checkpoint = read_folder(folder)
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [state.read() for state in checkpoint["optimizer_states"]]
    WholeCheckpointIO().save_checkpoint(checkpoint, file)


def _mistake(argv: Sequence[str]) -> str | None:
    if len(argv) != 2:
        return f"expected a folder and a file, got {len(argv)} arguments; {USAGE}"
    folder, file = map(Path, argv)
    if not folder.is_dir():
        return f"there is no folder {folder}; {USAGE}"
    if file.exists():
        return f"{file} exists: choose another name, or remove it"
    return None
