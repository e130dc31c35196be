"""The folder of a sharded checkpoint: what ``torch.distributed.checkpoint`` writes, with checksums, and data only.

Every rank writes a file of its own, ``__RANK_0.distcp``, tensors one after the other; ``.metadata`` says where each is,
and ``meta.pt`` holds all the rest, as Lightning's own strategies write it. ``ModelParallelStrategy`` finds weights
under ``state_dict``, Lightning's consolidation under ``model``: two names of the same bytes.
"""

from __future__ import annotations

import pickle
import warnings
import zlib
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import safe_globals
from typing_extensions import override

from lightning_swiftmoe.checkpoint.reading import CheckpointError, data_classes, listed, read_checkpoint
from lightning_swiftmoe.checkpoint.sums import what_we_added

META = "meta.pt"  # the name is Lightning's
TABLE = ".metadata"  # the name is torch's
WEIGHTS = "state_dict"
_WEIGHTS_TOO = "model"
OPTIMIZERS = "optimizer_states"  # in a checkpoint; in a folder each has a key of its own

Place = tuple[str | int, ...]  # of a value in nested dictionaries and lists

_BLOCK_BYTES = 1 << 20


class FolderWriter(FileSystemWriter):
    """Writes this rank's file, every byte of which reaches the disk; the first rank writes the table."""

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See ``StorageWriter``: weights are found under both names."""
        for key in [key for key in metadata.state_dict_metadata if key.startswith(f"{WEIGHTS}.")]:
            other = _other_name(key)
            metadata.state_dict_metadata[other] = metadata.state_dict_metadata[key]
            metadata.planner_data[other] = (_WEIGHTS_TOO, *metadata.planner_data[key][1:])
        super().finish(metadata, [[*written, *map(_under_other_name, _weights_of(written))] for written in results])


class FolderReader(FileSystemReader):
    """Reads a table that holds nothing but a table: torch's own reader would run code that somebody put there."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See ``StorageReader``.

        Raises:
            CheckpointError: it is missing, damaged, or holds more than data.
        """
        metadata = read_table(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _DataPlanner(DefaultLoadPlanner):
    """Takes what is no tensor as data: torch's own planner would run code."""

    @override
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """See ``LoadPlanner``."""
        assert read_item.type == LoadItemType.BYTE_IO
        with safe_globals(data_classes()):
            self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read_table(folder: Path) -> Metadata:
    """Where every tensor of a folder is.

    Raises:
        CheckpointError: there is no table, or it is damaged, or holds more than data.
    """
    path = folder / TABLE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no sharded checkpoint, it has no {TABLE}: choose another folder")
    try:
        with path.open("rb") as file:
            table = _TableUnpickler(file).load()
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path} is damaged, or no table of a checkpoint ({error}): choose another") from error
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, Mapping):
        raise CheckpointError(f"{path} holds no table of a checkpoint: choose another")
    return table


def read_rest(folder: Path) -> dict[str, Any]:
    """What is in a folder beside weights and optimizer state: steps, callbacks, and our checksums.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not (folder / META).is_file():
        raise CheckpointError(f"{folder} is no checkpoint of a Trainer, it has no {META}: choose another folder")
    return read_checkpoint(folder / META)


def read_values(folder: Path, targets: dict[str, Any]) -> None:
    """Fill the tensors of ``targets`` with what the folder has under their keys, and replace what is no tensor.

    Args:
        folder: of a sharded checkpoint, looked at before by ``check_folder``.
        targets: by key; a ``DTensor`` receives this rank's part. Not collective.

    Raises:
        CheckpointError: values are missing, damaged, or more than data.
    """
    if not targets:
        return
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that every rank loads for itself
            dcp.load(targets, storage_reader=FolderReader(folder), planner=_DataPlanner(), no_dist=True)
    except CheckpointException as error:
        causes = [str(cause).partition("\n")[0] for cause, _ in error.failures.values()]
        raise CheckpointError(f"{folder} cannot be read ({causes[0]}): choose another checkpoint") from error


def placeholder(kind: Any, device: str = "cpu") -> Any:
    """For ``read_values``: room for the whole of what the table describes."""
    is_tensor = isinstance(kind, TensorStorageMetadata)
    return torch.empty(kind.size, dtype=kind.properties.dtype, device=device) if is_tensor else None


def weight_keys(table: Metadata) -> dict[str, str]:
    """The key of every weight in the folder, by its name in the module."""
    for prefix in (f"{WEIGHTS}.", f"{_WEIGHTS_TOO}."):
        if found := {key.removeprefix(prefix): key for key in table.state_dict_metadata if key.startswith(prefix)}:
            return found
    return {}


def sums_of(folder: Path, table: Metadata, files: Iterable[str]) -> dict[str, int]:
    """A CRC-32 of every tensor's bytes in these files of the folder, by key, place in the tensor, and file."""
    sums = {}
    for name, items in _by_file(table).items():
        if name not in files:
            continue
        with (folder / name).open("rb") as file:
            for index, info in items:
                file.seek(info.offset)
                sums[_told(index, name)] = _crc(file, info.length)
    return sums


def file_sum(path: Path) -> int:
    """A CRC-32 of a whole file."""
    with path.open("rb") as file:
        return _crc(file, path.stat().st_size)


def files_of(table: Metadata) -> list[str]:
    """Names of the files that hold tensors, in order."""
    return sorted(_by_file(table))


def check_folder(folder: Path, share: int = 0, of: int = 1) -> None:
    """Whether the folder is whole and as it was written. What others wrote has no checksums: its sizes are looked at.

    Args:
        folder: of a sharded checkpoint.
        share: of the files whose every bit is looked at, for one of ``of`` ranks.
        of: ranks that look at a share each.

    Raises:
        CheckpointError: files are missing, cut short, or a bit of them changed; names the tensors.
    """
    known = what_we_added(read_rest(folder)).get("files")
    if known is not None and (folder / TABLE).is_file() and file_sum(folder / TABLE) != known.get(TABLE):
        raise CheckpointError(f"{folder / TABLE} was damaged since it was written: choose another checkpoint")
    table = read_table(folder)
    for name, items in _by_file(table).items():
        path = folder / name
        wanted = max(info.offset + info.length for _, info in items)
        if not path.is_file() or path.stat().st_size < wanted:
            what = "cut short" if path.is_file() else "missing"
            raise CheckpointError(f"{path} is {what}: the checkpoint is not whole; choose another")
    if known is None:
        return
    files = files_of(table)[share::of]
    changed = [told for told, value in sums_of(folder, table, files).items() if known.get(told) != value]
    if changed:
        raise CheckpointError(
            f"in {folder} {listed(changed)} not what was saved: the files were damaged; choose another checkpoint"
        )


def optimizer_key(number: int) -> str:
    """The key under which Lightning's own strategies save an optimizer."""
    return f"optimizer_{number}"


def nested(values: Mapping[Place, Any]) -> Any:
    """Dictionaries by name, and lists by number, with each value at its place."""
    inner: dict[str | int, dict[Place, Any]] = {}
    found: dict[str | int, Any] = {}
    for (first, *others), value in values.items():
        if others:
            inner.setdefault(first, {})[tuple(others)] = value
        else:
            found[first] = value
    found |= {first: nested(there) for first, there in inner.items()}
    is_list = bool(found) and all(isinstance(first, int) for first in found)
    return [found[number] for number in sorted(found)] if is_list else found


class _TableUnpickler(pickle.Unpickler):
    """Knows the classes of a table, and no others."""

    _ALLOWED = {  # noqa: RUF012
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata"),
                *("BytesStorageMetadata", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            )
        ),
    }

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        """See ``pickle.Unpickler``."""
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if (module_name, global_name) not in self._ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it holds {module_name}.{global_name}, which is no part of a table")
        return super().find_class(module_name, global_name)


def _by_file(table: Metadata) -> dict[str, list[tuple[MetadataIndex, Any]]]:
    """What each file holds; weights once, under their first name."""
    found: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    seen = set()
    for index, info in table.storage_data.items():
        place = (info.relative_path, info.offset)
        if place not in seen:
            seen.add(place)
            found.setdefault(info.relative_path, []).append((index, info))
    return found


def _told(index: MetadataIndex, file: str) -> str:
    """A name for one part of one tensor."""
    offset = "" if not index.offset or not any(index.offset) else f" from {list(index.offset)}"
    return f"{index.fqn}{offset} in {file}"


def _crc(file: Any, size: int) -> int:
    checksum = 0
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        checksum = zlib.crc32(block, checksum)
        size -= len(block)
    return checksum


def _weights_of(written: list[WriteResult]) -> list[WriteResult]:
    return [result for result in written if result.index.fqn.startswith(f"{WEIGHTS}.")]


def _under_other_name(result: WriteResult) -> WriteResult:
    index = MetadataIndex(_other_name(result.index.fqn), result.index.offset, result.index.index)
    return WriteResult(index, result.size_in_bytes, result.storage_data)


def _other_name(key: str) -> str:
    return _WEIGHTS_TOO + key.removeprefix(WEIGHTS)
