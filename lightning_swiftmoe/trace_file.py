"""The file of a load trace: it grows while training runs, and can be read at any time.

A file ``*.npy.gz`` is a row of gzip members (RFC 1952) of arrays as ``numpy.save`` writes them. The first member is a
string, the trace's meta as JSON. Each of the others is a chunk of consecutive steps: ``steps``, ``counts``,
``replicas`` and ``rank_load``, in the smallest integers that hold their values. So ``gzip.open`` and ``numpy.load``,
called until the file ends, read it too. A chunk whose end is missing is being written, or was when its writer was
killed: it does not count.

Traces of earlier versions, and those of ``LoadTrace.save``, are ``.npz`` files with the same arrays.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SUFFIX = ".npy.gz"

Arrays = Mapping[str, NDArray[np.integer]]

_TYPES = {"steps": np.int64, "counts": np.int32, "replicas": np.int16, "rank_load": np.int32}
_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 31  # zlib's word for: with gzip's header and check sum
_BLOCK_BYTES = 1 << 20
# Levels above make it 2 % smaller and take five times as long: docs/decisions/0013-trace-appended.md.
_LEVEL = 1


def read_trace(path: str | os.PathLike[str]) -> dict[str, NDArray]:
    """All complete steps of a trace, whatever its format, also while training writes it.

    Returns:
        ``steps [T]``, ``counts [T, L, N, E]`` assignments before drops by rank and expert, and ``meta``, a JSON string;
        of a training run also ``replicas [T, L, E]`` in force and ``rank_load [T, L, N]`` assignments processed.

    Raises:
        ValueError: no such file, another kind of file, a damaged one, or one without a step.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no trace at {path}; train with trace=FILE, or name a generator such as synthetic=zipf")
    return _read_chunks(path) if _grows(path) else _read_npz(path)


def is_trace(path: Path) -> bool:
    """Whether ``read_trace`` would find steps in this file."""
    if _grows(path):
        return next(chunks(path), None) is not None
    with np.load(path, allow_pickle=False) as file:
        return "counts" in file.files and file["counts"].ndim == 4


def chunks(path: Path) -> Iterator[tuple[dict[str, Any], Arrays, int]]:
    """Of every complete chunk: the trace's meta, arrays of its steps, and where in the file it ends, in bytes.

    Raises:
        ValueError: the file holds something else, or is damaged.
    """
    meta = None
    with path.open("rb") as file:
        try:
            for content, end in _members(file):
                stream = io.BytesIO(content)
                if meta is None:
                    meta = json.loads(str(np.load(stream)))
                else:
                    yield meta, {name: np.load(stream) for name in _TYPES}, end
        except (ValueError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no trace, or a damaged one ({error}); train with trace=FILE anew") from error


class TraceFile:
    """A trace that grows.

    Args:
        path: the file; its folders are made, and what it holds is replaced unless ``resume`` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._meta: Mapping[str, Any] | None = None
        self._last_step = 0
        self._end = 0

    def check(self) -> None:
        """Make sure that the file can be written; changes nothing in it.

        Raises:
            OSError: it cannot.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("ab").close()

    def resume(self, last_step: int) -> None:
        """Go on behind ``last_step``: what the file says about later steps, and a chunk without an end, is cut off.

        Raises:
            OSError: the file cannot be read or cut.
            ValueError: it is no trace.
        """
        self._meta, self._end = None, 0
        try:
            for meta, arrays, end in chunks(self.path):
                early = arrays["steps"] <= last_step
                if not early.all():
                    self._write(meta, {name: values[early] for name, values in arrays.items()})
                    return
                self._meta, self._last_step, self._end = meta, int(arrays["steps"][-1]), end
        except ValueError:
            if self._meta is None:
                raise
        os.truncate(self.path, self._end)

    def append(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a chunk behind the last complete one. After an error the next call takes this chunk's place.

        A trace with other layers, ranks, experts or slots is kept beside this one, as ``NAME.until-STEP.npy.gz``.

        Args:
            meta: what is the same in every step.
            arrays: ``steps``, ``counts``, ``replicas`` and ``rank_load`` of ``read_trace``, of at least one step.

        Raises:
            OSError: it could not be written.
        """
        if self._meta is not None and _shape(self._meta) != _shape(meta):
            stem = self.path.name.removesuffix(SUFFIX)
            self.path.replace(self.path.with_name(f"{stem}.until-{self._last_step}{SUFFIX}"))
            self._meta, self._end = None, 0
        self._write(meta, arrays)

    def _write(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Whatever lies behind the last complete chunk goes."""
        steps = arrays["steps"]
        head = b"" if self._meta is not None else _packed([np.array(json.dumps(meta))])
        content = head + _packed([_narrow(arrays[name]) for name in _TYPES]) if steps.size else b""
        with self.path.open("r+b" if self._end else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(content)
        if content:
            self._meta, self._last_step = meta, int(steps[-1])
            self._end += len(content)


def _grows(path: Path) -> bool:
    """By what it begins with: an empty file has just been made."""
    with path.open("rb") as file:
        return file.read(len(_GZIP)) in (b"", _GZIP)


def _read_chunks(path: Path) -> dict[str, NDArray]:
    found = list(chunks(path))
    if not found:
        raise ValueError(f"{path} holds no step yet; read it a few seconds after the first step")
    arrays = {name: np.concatenate([part[name] for _, part, _ in found], dtype=kind) for name, kind in _TYPES.items()}
    return arrays | {"meta": np.array(json.dumps(found[0][0]))}


def _read_npz(path: Path) -> dict[str, NDArray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz trace ({error}); write it with numpy.savez") from error
    lacking = [key for key in ("counts", "steps", "meta") if key not in arrays]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; a trace holds counts, steps and meta")
    return arrays


def _members(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Content of every complete gzip member, and where it ends; no more than one is in memory."""
    end, block = 0, file.read(_BLOCK_BYTES)
    while block:
        unpacker, parts = zlib.decompressobj(_GZIP_WINDOW), []
        while block and not unpacker.eof:
            parts.append(unpacker.decompress(block))
            end += len(block) - len(unpacker.unused_data)
            block = unpacker.unused_data or file.read(_BLOCK_BYTES)
        if unpacker.eof:
            yield b"".join(parts), end


def _packed(arrays: Sequence[NDArray]) -> bytes:
    content = io.BytesIO()
    for array in arrays:
        np.save(content, array, allow_pickle=False)
    return gzip.compress(content.getvalue(), _LEVEL, mtime=0)


def _narrow(values: NDArray) -> NDArray:
    return values.astype(np.min_scalar_type(values.max()))


def _shape(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A batch may be smaller than others, so the number of tokens says nothing."""
    return {key: value for key, value in meta.items() if key != "tokens_per_rank"}
