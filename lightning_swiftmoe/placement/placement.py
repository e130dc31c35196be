"""A placement: which expert sits in which slot of which rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_swiftmoe.arguments import described

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Placement:
    """The table slot -> expert of one layer, validated and immutable.

    Args:
        table: ``[N, s]`` integers; ``table[j, i]`` is the expert in slot ``i`` of rank ``j``.
        num_experts: logical experts ``E`` of the layer.

    Attributes:
        replicas: ``[E]`` slots that hold each expert; they add up to ``N * s``.

    Raises:
        ValueError: not a two-dimensional integer table, an expert outside ``0 .. E-1``, or an expert without a slot.
    """

    table: IntArray
    num_experts: int
    replicas: IntArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = _as_integers(self.table)
        if table is None or table.ndim != 2 or table.size == 0:
            raise ValueError(f"a placement is an [N, s] table of expert numbers, got {described(self.table)}")
        is_outside = (table < 0) | (table >= self.num_experts)
        if np.count_nonzero(is_outside):
            outside = sorted(set(table[is_outside].tolist()))
            raise ValueError(f"slots hold experts 0 .. {self.num_experts - 1}, got {outside}")
        replicas = np.bincount(table.ravel(), minlength=self.num_experts)
        if np.count_nonzero(replicas) < self.num_experts:
            raise ValueError(f"every expert needs a slot; these have none: {np.flatnonzero(replicas == 0).tolist()}")
        object.__setattr__(self, "table", _frozen(table))
        object.__setattr__(self, "replicas", _frozen(replicas))

    @classmethod
    def contiguous(cls, replicas: ArrayLike, slots_per_rank: int) -> Placement:
        """Lay experts out one after the other, ``replicas[e]`` slots each.

        Example: replicas ``[1, 3]`` with two slots per rank give ``[[0, 1], [1, 1]]``.
        """
        counts = np.asarray(replicas, dtype=np.int64)
        slots = np.arange(counts.size).repeat(counts)
        return cls(slots.reshape(-1, slots_per_rank), counts.size)

    @property
    def num_ranks(self) -> int:
        """Ranks ``N``."""
        return self.table.shape[0]

    @property
    def slots_per_rank(self) -> int:
        """Slots ``s`` of one rank."""
        return self.table.shape[1]

    def is_contiguous_with(self, replicas: IntArray, slots_per_rank: int) -> bool:
        """Whether ``contiguous(replicas, slots_per_rank)`` would be equal to this placement."""
        if slots_per_rank != self.slots_per_rank or replicas.size != self.num_experts:
            return False
        return not np.count_nonzero(replicas != self.replicas) and self._is_sorted

    @cached_property
    def _is_sorted(self) -> bool:
        slots = self.table.ravel()
        return not np.count_nonzero(slots[1:] < slots[:-1])

    @cached_property
    def multiplicity(self) -> IntArray:
        """``[N, E]`` slots of rank ``j`` that hold expert ``e``."""
        first_of_rank = np.arange(0, self.num_ranks * self.num_experts, self.num_experts)
        pairs = self.table + first_of_rank[:, None]
        counts = np.bincount(pairs.ravel(), minlength=self.num_ranks * self.num_experts)
        return _frozen(counts.reshape(self.num_ranks, self.num_experts))

    @cached_property
    def _residents(self) -> tuple[IntArray, ...]:
        return tuple(_frozen(np.unique(row)) for row in self.table)

    def residents(self, rank: int) -> IntArray:
        """The distinct experts on ``rank``, ascending. Slots of one rank with the same expert share one resident."""
        return self._residents[rank]

    @cached_property
    def num_residents(self) -> IntArray:
        """``[N]`` distinct experts on each rank."""
        return _frozen(np.array([r.size for r in self._residents]))

    def hosts(self, expert: int) -> IntArray:
        """Ranks with at least one slot for ``expert``, ascending."""
        return np.flatnonzero(self.multiplicity[:, expert])

    def moved_from(self, previous: Placement) -> int:
        """Residents here that were not resident on the same rank before: weights that reach a new rank."""
        if self is previous:
            return 0
        return int(np.count_nonzero((self.multiplicity > 0) & (previous.multiplicity == 0)))

    def same_residents(self, other: Placement) -> bool:
        """Whether every rank holds as many of each expert: the order of its slots changes nothing."""
        return self is other or np.array_equal(self.multiplicity, other.multiplicity)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.num_experts == other.num_experts and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.num_experts, self.table.shape, self.table.tobytes()))


def _as_integers(given: ArrayLike) -> IntArray | None:
    """A copy of ``given``; None where it holds anything but whole numbers."""
    try:
        array = np.asarray(given)
    except ValueError:  # rows of different lengths
        return None
    if array.dtype == np.int64:
        return array.copy()
    if array.dtype.kind not in "iuf":
        return None
    with np.errstate(invalid="ignore"):  # a NaN is no number, which the comparison finds
        table = array.astype(np.int64)
    return table if np.array_equal(table, array) else None


def _frozen(array: NDArray) -> NDArray:
    array.setflags(write=False)
    return array
