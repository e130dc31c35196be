"""Saving sharded checkpoints: a folder to which every rank adds the tensors it holds.

Experts are written by whoever has their shards. What every rank has, dense weights and their optimizer state, is dealt
out so that all ranks write about as many bytes. Optimizer state goes by the names of Parameters, as
``torch.distributed.checkpoint.state_dict`` has it.
"""

from __future__ import annotations

import copy
import errno
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_swiftmoe.checkpoint.folder import (
    META,
    OPTIMIZERS,
    TABLE,
    WEIGHTS,
    FolderWriter,
    Place,
    file_sum,
    files_of,
    nested,
    optimizer_key,
    read_table,
    sums_of,
)
from lightning_swiftmoe.checkpoint.sums import KEY, named_tensors, with_sums
from lightning_swiftmoe.checkpoint.whole_file import put_in_place, sync_folder, write_whole
from lightning_swiftmoe.parallel.expert_tensor import ExpertTensor, as_dtensor

Group = dist.ProcessGroup | None

T = TypeVar("T")


def sharded_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` of the user's module with parts of experts as ``DTensor``."""
    return {name: as_dtensor(value) if isinstance(value, ExpertTensor) else value for name, value in state_dict.items()}


def sharded_optimizer_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """``optimizer.state_dict()`` by names of Parameters, with parts as ``DTensor``.

    Args:
        optimizer: the user's.
        names: of all its Parameters.

    Raises:
        ValueError: it has a Parameter without a name.
    """
    numbered = optimizer.state_dict()
    strangers = [param for group in optimizer.param_groups for param in group["params"] if param not in names]
    if strangers:
        raise ValueError(
            f"{type(optimizer).__name__} has {len(strangers)} Parameter(s) that are not in the module, and sharded "
            "checkpoints go by names: make them attributes of the module, or use checkpoint='full'"
        )
    order = [names[param] for group in optimizer.param_groups for param in group["params"]]
    state = {
        order[number]: {key: as_dtensor(v) if isinstance(v, ExpertTensor) else v for key, v in values.items()}
        for number, values in numbered["state"].items()
    }
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in numbered["param_groups"]]
    return {"state": state, "param_groups": groups}


@dataclass(frozen=True)
class Content:
    """What one rank adds to a folder, and what the first rank adds beside.

    Args:
        values: tensors and other values by key.
        rest: of the checkpoint, on rank 0.
    """

    values: dict[str, Any]
    rest: dict[str, Any]

    def on_host(self, kept: dict[Place, Tensor]) -> Content:
        """A copy that training does not change.

        Args:
            kept: memory of the last copy, which is used again, and of this one afterwards: pinned where tensors are on
                a GPU, from which they come ten times as fast. Making such memory takes longer than that.
        """
        values = _copied(self.values, (), kept)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Content(values, copy.deepcopy(self.rest))


def share_of(checkpoint: Mapping[str, Any], group: Group) -> Content:
    """This rank's part of a checkpoint of Lightning's, whose tensors are parts or the same on every rank. Collective.

    Args:
        checkpoint: with ``state_dict``, and ``optimizer_states`` where they are saved.
        group: of all ranks, on the host; None with one rank.
    """
    rank = 0 if group is None else dist.get_rank(group)
    places = _places(checkpoint)
    parts = {place: value for place, value in places.items() if isinstance(value, DTensor)}
    mine = {place: value for number, (place, value) in enumerate(parts.items()) if _is_written_here(value, number)}
    loads = _told_by_all(sum(value.to_local().nbytes for value in mine.values()), group)
    dealt = _dealt({place: value for place, value in places.items() if place not in parts}, loads)
    mine |= {place: places[place] for place, owner in dealt.items() if owner == rank}
    rest = {key: value for key, value in checkpoint.items() if key not in (WEIGHTS, OPTIMIZERS, KEY)}
    return Content(nested(mine), rest if rank == 0 else {})


def write_folder(content: Content, path: Path, group: Group) -> None:
    """Write a folder that takes the name ``path`` when all of it is on the disk; until then ``path`` stays as it was.

    Collective over ``group``, and the same outcome on every rank of it.

    Args:
        content: see ``share_of``.
        path: of the folder.
        group: of all ranks, on the host, used by nobody else meanwhile; None with one rank.

    Raises:
        OSError: the disk of some rank is full, or refuses; ``path`` is what it was before.
    """
    rank = 0 if group is None else dist.get_rank(group)
    part = path.with_name(f".{path.name.replace('_', '-')}.part")

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def write() -> None:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one rank is one rank
            dcp.save(content.values, storage_writer=FolderWriter(part), process_group=group, no_dist=group is None)

    def end() -> None:
        if rank == 0:
            files = {name: value for sums in told for name, value in sums.items()}
            files[TABLE] = file_sum(part / TABLE)
            rest = with_sums(content.rest, files)
            write_whole(part / META, lambda file: torch.save(rest, file))
            sync_folder(part)
            put_in_place(part, path)

    try:
        _together(begin, group)
        write()
        told = _together(lambda: _own_sums(part, rank), group)
        _together(end, group)
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise _as_os_error(error, path) from error


def _places(checkpoint: Mapping[str, Any]) -> dict[Place, Any]:
    """Everything that goes into the files, and where consolidation will put it."""
    places: dict[Place, Any] = {(WEIGHTS, name): value for name, value in checkpoint[WEIGHTS].items()}
    for number, optimizer in enumerate(checkpoint.get(OPTIMIZERS, [])):
        for name, state in optimizer["state"].items():
            places |= {(optimizer_key(number), "state", name, key): value for key, value in state.items()}
        places[optimizer_key(number), "param_groups"] = optimizer["param_groups"]
    return places


def _is_written_here(part: DTensor, number: int) -> bool:
    """With several expert groups the same part is on a rank of each: they take turns, by the tensor's number."""
    where = part.device_mesh.get_coordinate()
    assert where is not None
    is_turn = len(where) == 1 or where[0] == number % part.device_mesh.size(0)
    return is_turn and part.to_local().numel() > 0


def _dealt(values: Mapping[Place, Any], loads: Sequence[int]) -> dict[Place, int]:
    """Which rank writes what all have: the largest first, each by the rank with the least to write so far.

    Args:
        values: by place; what is no tensor is written by rank 0.
        loads: bytes that each rank writes besides.
    """
    loads = list(loads)
    sizes = {place: sum(tensor.nbytes for _, tensor in named_tensors(value)) for place, value in values.items()}
    owners = {}
    for place in sorted(values, key=lambda place: (-sizes[place], place)):
        owner = loads.index(min(loads)) if sizes[place] else 0
        loads[owner] += sizes[place]
        owners[place] = owner
    return owners


def _own_sums(part: Path, rank: int) -> dict[str, int]:
    table = read_table(part)  # what dcp.save returns lacks places before torch 2.12
    own = [name for name in files_of(table) if name.startswith(f"__{rank}_")]
    return sums_of(part, table, own)


def _copied(value: Any, place: Place, kept: dict[Place, Tensor]) -> Any:
    """In memory of its own on the host; of tensors on a GPU once the device gets there."""
    if isinstance(value, DTensor):
        return as_dtensor(value, _copied(value.to_local(), place, kept))
    if isinstance(value, Tensor):
        known = kept.get(place)
        if known is None or known.shape != value.shape or known.dtype != value.dtype:
            known = kept[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return known.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copied(inner, (*place, key), kept) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(inner, (*place, number), kept) for number, inner in enumerate(value))
    return copy.deepcopy(value)


def _together(work: Callable[[], T], group: Group) -> list[T]:
    """``work()`` on every rank: all results by rank, or an OSError on every rank where one failed. Collective."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        failure = (code or errno.EIO, f"{type(error).__name__}: {error}")
    told = _told_by_all((result, failure), group)
    for rank, (_, failure) in enumerate(told):
        if failure is not None:
            raise OSError(failure[0], f"rank {rank}: {failure[1]}")
    return [cast(T, result) for result, _ in told]


def _told_by_all(mine: T, group: Group) -> list[T]:
    if group is None:
        return [mine]
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group)
    return told


def _as_os_error(error: BaseException, path: Path) -> OSError:
    """What kept the folder from being written."""
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        causes = [failure for failure, _ in error.failures.values()]
    cause = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
    said = cause.strerror if isinstance(cause, OSError) and cause.strerror else f"{type(cause).__name__}: {cause}"
    return OSError(code, f"{path} was not saved ({said}) and is what it was before: make room there, or save elsewhere")
