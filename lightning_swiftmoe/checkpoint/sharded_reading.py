"""Loading sharded checkpoints: weights whole, of optimizer state what this rank keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from lightning_swiftmoe.checkpoint.folder import (
    OPTIMIZERS,
    WEIGHTS,
    Place,
    nested,
    optimizer_key,
    placeholder,
    read_rest,
    read_table,
    read_values,
    weight_keys,
)
from lightning_swiftmoe.checkpoint.full import Owner
from lightning_swiftmoe.parallel.expert_tensor import ExpertTensor, as_dtensor


def read_folder(path: Path, left: Collection[str] = ()) -> dict[str, Any]:
    """A sharded checkpoint as Lightning wants one: weights whole, optimizer states to be read when wanted.

    Args:
        path: of the folder, looked at before by ``check_folder``.
        left: names of weights that stay there: tensors on the meta device stand for them, and ``saved_weights`` reads.

    Raises:
        CheckpointError: it has not what a Trainer saved, or more than data.
    """
    rest = read_rest(path)
    table = read_table(path)
    keys = weight_keys(table)
    values = {
        key: placeholder(table.state_dict_metadata[key], "meta" if name in left else "cpu")
        for name, key in keys.items()
    }
    read_values(path, {key: value for key, value in values.items() if not _is_left(value)})
    checkpoint = {**rest, WEIGHTS: {name: values[key] for name, key in keys.items()}}
    if states := saved_optimizers(path, table):
        checkpoint[OPTIMIZERS] = states
    return checkpoint


def saved_weights(path: Path, names: Collection[str]) -> dict[str, SavedWeight]:
    """Those of the named weights that a folder has.

    Args:
        path: of the folder.
        names: of the module.
    """
    table = read_table(path)
    return {
        name: SavedWeight(path, key, table.state_dict_metadata[key])
        for name, key in weight_keys(table).items()
        if name in names
    }


@dataclass(frozen=True)
class SavedWeight:
    """A weight in a folder, to be read when it is known how much of it is wanted. Not collective.

    Args:
        path: of the folder.
        key: of the tensor there.
        kind: as the folder's table describes it.
    """

    path: Path
    key: str
    kind: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of what was saved."""
        dtype: torch.dtype = self.kind.properties.dtype
        return dtype

    def whole(self) -> Tensor:
        """All of it."""
        whole: Tensor = placeholder(self.kind)
        read_values(self.path, {self.key: whole})
        return whole

    def read_into(self, target: Tensor) -> None:
        """The part that ``target`` is of it: an ``ExpertTensor`` on the host."""
        assert isinstance(target, ExpertTensor)
        read_values(self.path, {self.key: as_dtensor(target)})


def saved_optimizers(path: Path, table: Metadata) -> list[SavedOptimizer]:
    """All optimizers whose state a folder has."""
    states: list[SavedOptimizer] = []
    names = {place[0] for place in table.planner_data.values()}
    while optimizer_key(len(states)) in names:
        states.append(SavedOptimizer(path, len(states)))
    return states


@dataclass(frozen=True)
class SavedOptimizer:
    """State of one optimizer in a folder.

    Args:
        path: of the folder.
        number: of the optimizer.
    """

    path: Path
    number: int

    def described(self) -> dict[str, Any]:
        """As ``optimizer.state_dict()``, with tensors that have a shape and no memory."""
        return self._numbered({entry.key: placeholder(entry.kind, "meta") for entry in self._entries})

    def read(self, owners: Sequence[Owner | None] = ()) -> dict[str, Any]:
        """As ``optimizer.state_dict()``. Not collective.

        Args:
            owners: of each Parameter in the optimizer's order, None for a dense one: of what is sharded, this rank's
                part alone is read. None given: all tensors are read whole.
        """
        values = {entry.key: _room(entry, owners) for entry in self._entries}
        targets = {key: as_dtensor(v) if isinstance(v, ExpertTensor) else v for key, v in values.items()}
        targets = {key: v for key, v in targets.items() if not isinstance(v, DTensor) or v.to_local().numel()}
        read_values(self.path, targets)
        filled = {key: v if isinstance(v, Tensor) else targets[key] for key, v in values.items()}
        return self._numbered(filled)

    @cached_property
    def names(self) -> list[str]:
        """Of the Parameters, in the optimizer's order."""
        return [name for group in self._groups for name in group["params"]]

    @cached_property
    def _table(self) -> Metadata:
        return read_table(self.path)

    @cached_property
    def _groups(self) -> list[dict[str, Any]]:
        """As of ``optimizer.state_dict()``, with names of Parameters."""
        places = self._places("param_groups")
        found: dict[str, Any] = {key: placeholder(kind) for key, (_, kind) in places.items()}
        read_values(self.path, found)
        return nested({place: found[key] for key, (place, _) in places.items()})

    @cached_property
    def _entries(self) -> list[_Entry]:
        numbers = {name: number for number, name in enumerate(self.names)}
        found = [
            _Entry(numbers[str(place[0])], place[1:], key, kind) for key, (place, kind) in self._places("state").items()
        ]
        return sorted(found, key=lambda entry: (entry.number, entry.key))

    def _places(self, part: str) -> dict[str, tuple[Place, Any]]:
        """Of every value in ``state`` or ``param_groups``, by key: where it is there, and what it is."""
        table = self._table
        return {
            key: (tuple(place[2:]), table.state_dict_metadata[key])
            for key, place in table.planner_data.items()
            if place[:2] == (optimizer_key(self.number), part)
        }

    def _numbered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        state = nested({(str(entry.number), *entry.place): values[entry.key] for entry in self._entries})
        numbers = iter(range(len(self.names)))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in self._groups]
        return {"state": {int(number): values for number, values in state.items()}, "param_groups": groups}


@dataclass(frozen=True)
class _Entry:
    """One value of a Parameter's optimizer state: where it is in that state, and in the folder."""

    number: int
    place: Place
    key: str
    kind: Any


def _is_left(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _room(entry: _Entry, owners: Sequence[Owner | None]) -> Any:
    """Where the value is read to: as much of it as this rank keeps."""
    owner = owners[entry.number] if entry.number < len(owners) else None
    if owner is None or not isinstance(entry.kind, TensorStorageMetadata):
        return placeholder(entry.kind)
    hosted, key = owner
    if entry.kind.size != hosted.shapes[key]:
        return placeholder(entry.kind)
    local = torch.empty(hosted.local(key).shape, dtype=entry.kind.properties.dtype)
    return hosted.wrapped(key, local)
