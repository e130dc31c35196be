"""The shape of the expert-parallel world: how many ranks, how many expert slots on each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.arguments import check_count


@dataclass(frozen=True)
class ClusterShape:
    """What a placement policy may know of the cluster. All fields are counts.

    Args:
        num_ranks: ranks in the expert-parallel world (``N``).
        slots_per_rank: physical expert positions on one rank (``s``).
        num_experts: logical experts of one layer (``E``); ``N * s >= E``.
        has_capacity: whether experts drop tokens beyond a capacity of their own. Policies that only balance ranks
            behave differently from those that must give a hot expert room.

    Raises:
        ValueError: a count below one, or fewer slots than experts.
    """

    num_ranks: int
    slots_per_rank: int
    num_experts: int
    has_capacity: bool = False

    def __post_init__(self) -> None:
        for name in ("num_ranks", "slots_per_rank", "num_experts"):
            check_count(name, getattr(self, name))
        if self.num_slots < self.num_experts:
            raise ValueError(
                f"{self.num_ranks} ranks x {self.slots_per_rank} slots hold {self.num_slots} experts, but the layer "
                f"has {self.num_experts}; the smallest slots_per_rank that works is "
                f"{min_slots(self.num_experts, self.num_ranks)}"
            )

    @property
    def num_slots(self) -> int:
        """Slots in the whole cluster, ``N * s``."""
        return self.num_ranks * self.slots_per_rank

    @property
    def may_lack_experts(self) -> bool:
        """Whether a rank may be without some expert."""
        return self.num_ranks > 1 and self.slots_per_rank < self.num_experts


@dataclass(frozen=True)
class ExpertGroup:
    """One of ``count`` groups of consecutive ranks, each of which holds a whole set of experts.

    Args:
        index: which one.
        count: groups of the job (``G``).
    """

    index: int = 0
    count: int = 1

    def rows(self, by_rank: NDArray) -> NDArray:
        """``[N, ...]`` of this group's ranks from ``by_rank [G * N, ...]`` of all ranks."""
        return np.split(by_rank, self.count)[self.index]


def min_slots(num_experts: int, num_ranks: int) -> int:
    """The fewest slots per rank that give every expert a place."""
    return -(-num_experts // num_ranks)


def resolve_slots(slots_per_rank: int | str, num_experts: int, num_ranks: int) -> int:
    """Turn the user's ``slots_per_rank`` into a number.

    ``"auto"`` gives every expert two replicas on average, as far as a rank can use them: a rank with all
    ``E`` experts has nothing to gain from one more slot.

    Raises:
        ValueError: neither ``"auto"`` nor a positive integer.
    """
    if slots_per_rank == "auto":
        return min(num_experts, 2 * min_slots(num_experts, num_ranks))
    check_count("slots_per_rank", slots_per_rank, '"auto" or a positive integer')
    return int(slots_per_rank)


def resolve_group_size(expert_parallel_size: int | None, num_ranks: int) -> int:
    """How many of ``num_ranks`` share one set of experts: all of them where the user named no number.

    Raises:
        ValueError: not a positive integer, or it does not divide the ranks.
    """
    if expert_parallel_size is None:
        return num_ranks
    check_group_size(expert_parallel_size)
    if num_ranks % expert_parallel_size:
        fitting = ", ".join(str(size) for size in range(1, num_ranks + 1) if num_ranks % size == 0)
        raise ValueError(
            f"expert_parallel_size = {expert_parallel_size} must divide the {num_ranks} rank(s) of the job: choose "
            f"one of {fitting}, or None for all of them"
        )
    return expert_parallel_size


def check_group_size(expert_parallel_size: int | None) -> None:
    """Raise a ValueError for what is neither None nor a positive integer."""
    if expert_parallel_size is not None:
        check_count("expert_parallel_size", expert_parallel_size, "None (all ranks) or a positive integer")
