"""Files that appear under their name only when whole, and that tell when a bit of them changed.

A file is written beside its place, ``.NAME.PID.part``, reaches the disk, and takes its name in one step. Its last bytes
are a checksum of all others: the comment that the zip format allows at its end, which every reader of zip files skips.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_END_OF_ZIP = b"PK\x05\x06"
_MAGIC = b"swiftmoe crc"
_TAIL = struct.Struct(f"<H{len(_MAGIC)}sI")  # length of the comment, which is the magic and the checksum
_END_OF_ZIP_BYTES = 20  # without the length of the comment
_NO_COMMENT = b"\0\0"  # the length of one; a zip file without a comment ends with it
_BLOCK_BYTES = 1 << 20
_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a zip file that takes the name ``path`` when it is whole; until then ``path`` stays as it was.

    Args:
        path: its folder must exist. What a killed save left there for the same name is removed.
        write: writes a zip file without a comment, from its start to its end.

    Raises:
        OSError: the disk is full, or refuses; ``path`` is what it was before.
    """
    _remove_leftovers(path)
    part = _part(path, str(os.getpid()))
    try:
        with part.open("xb") as file:
            _write_with_checksum(file, write)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(part, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} was not saved ({error.strerror}) and is what it was before: make room there, or save elsewhere",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def put_in_place(new: Path, path: Path) -> None:
    """Give ``new`` the name ``path``, whatever had it before: a file or a folder, which is gone afterwards.

    One step, so that a kill leaves either; two where a folder is replaced on a file system that cannot swap names.
    """
    both_files = not new.is_dir() and not path.is_dir()
    if both_files or not os.path.lexists(path):
        os.replace(new, path)
    elif _swap_names(new, path):
        _remove(new)
    else:
        aside = path.with_name(f".{path.name}.before")
        os.replace(path, aside)
        os.replace(new, path)
        _remove(aside)
    sync_folder(path.parent)


def is_unchanged(path: Path) -> bool | None:
    """Whether every bit of a file of ``write_whole`` is as it was written; None for a file that others wrote.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        covered = file.seek(0, os.SEEK_END) - _TAIL.size
        if covered < _END_OF_ZIP_BYTES:
            return None
        file.seek(covered - _END_OF_ZIP_BYTES)
        if file.read(len(_END_OF_ZIP)) != _END_OF_ZIP:
            return None
        file.seek(covered)
        tail = file.read()
        file.seek(0)
        return tail == _tail(_checksum(file, covered))


class _Summing:
    """A file to write to from start to end, with the checksum of what went by."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.checksum = 0
        self.refusal: OSError | None = None

    def write(self, data: Any) -> int:
        """All of ``data``, any bytes-like object."""
        self.checksum = zlib.crc32(data, self.checksum)
        try:
            return self._file.write(data)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        """As of a file."""
        self._file.flush()


def _write_with_checksum(file: IO[bytes], write: Callable[[IO[bytes]], None]) -> None:
    summing = _Summing(file)
    try:
        write(summing)  # type: ignore[arg-type]
    except Exception:
        # torch's writer, closed after it, complains of something else.
        if summing.refusal is not None:
            raise summing.refusal from None
        raise
    file.seek(-len(_NO_COMMENT), os.SEEK_END)
    file.write(_tail(summing.checksum))


def _tail(checksum: int) -> bytes:
    return _TAIL.pack(len(_MAGIC) + 4, _MAGIC, checksum)


def _checksum(file: IO[bytes], size: int) -> int:
    """Of the zip file before it got a comment: its first ``size`` bytes, and a length of zero."""
    checksum = 0
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        checksum = zlib.crc32(block, checksum)
        size -= len(block)
    return zlib.crc32(_NO_COMMENT, checksum)


def _part(path: Path, writer: str) -> Path:
    # Lightning takes every name that holds "hpc_ckpt_" for a checkpoint of that number.
    return path.with_name(f".{path.name.replace('_', '-')}.{writer}.part")


def _remove_leftovers(path: Path) -> None:
    for other in path.parent.iterdir():
        writer = other.name.removesuffix(".part").rpartition(".")[2]
        if writer.isdigit() and other == _part(path, writer):
            other.unlink(missing_ok=True)


def _swap_names(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or its file system cannot (Linux, local disks can)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_HERE, os.fsencode(one.absolute()), _HERE, os.fsencode(other.absolute()), _EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(folder: Path) -> None:
    """The new name is on the disk too, where folders can be flushed: not all network file systems do."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        os.fsync(opened)
    os.close(opened)
