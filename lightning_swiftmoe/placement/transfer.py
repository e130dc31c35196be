"""From one shard map to another: which interval of which expert goes from where to where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from lightning_swiftmoe.placement.placement import IntArray, Placement
from lightning_swiftmoe.placement.shards import EvenShards

Intervals = list[tuple[int, int, int]]


class ShardMap(Protocol):
    """Says who owns which interval of an expert. The intervals of an expert cover it once, in ascending order."""

    @property
    def num_elements(self) -> int:
        """Elements ``P`` of one expert's parameter."""
        ...

    def intervals(self, expert: int) -> Intervals:
        """``(rank, start, stop)`` of every owner."""
        ...


@dataclass(frozen=True)
class EvenMap:
    """``EvenShards`` as a shard map: the same owners whatever the placement, so nothing ever moves."""

    shards: EvenShards

    @property
    def num_elements(self) -> int:
        """Elements ``P`` of one expert's parameter."""
        return self.shards.num_elements

    def intervals(self, expert: int) -> Intervals:
        """``(rank, start, stop)`` of every rank that owns something."""
        ranks = range(self.shards.num_ranks)
        return [(rank, *self.shards.interval(rank)) for rank in ranks if self.shards.size(rank)]


@dataclass(frozen=True)
class WeightReplicas:
    """Weights on every host of an expert, whole: a source for new hosts, not a partition."""

    num_elements: int
    placement: Placement


class Transfer(NamedTuple):
    """Elements ``start .. stop`` of ``expert`` go from rank ``src`` to rank ``dst``; they stay put where both agree."""

    src: int
    dst: int
    expert: int
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        """How many elements."""
        return self.stop - self.start


def transfer_plan(here: ShardMap, there: ShardMap, experts: Iterable[int]) -> tuple[Transfer, ...]:
    """Every element of ``there`` and the rank that has it ``here``, ordered by expert, then element.

    Transfers with ``src == dst`` are part of the plan, so that it covers the new map exactly once.

    Example: an expert of 6 elements owned by ranks 0 and 1 (3 each) goes to ranks 0, 1 and 2 (2 each): rank 0 keeps
    0..2 and sends 2..3 to rank 1, which keeps 3..4 and sends 4..6 to rank 2.

    Args:
        here: who owns what now.
        there: who shall own what.
        experts: which experts to plan for.

    Raises:
        ValueError: the maps are for experts of different size.
    """
    if here.num_elements != there.num_elements:
        raise ValueError(
            f"both shard maps must be of the same parameter, got {here.num_elements} and {there.num_elements} elements"
        )
    return tuple(t for e in experts for t in _overlaps(e, here.intervals(e), there.intervals(e)))


def _overlaps(expert: int, here: Intervals, there: Intervals) -> Iterable[Transfer]:
    i = 0
    for dst, start, stop in there:
        while start < stop:
            src, _, end = here[i]
            cut = min(stop, end)
            if start < cut:
                yield Transfer(src, dst, expert, start, cut)
                start = cut
            if cut == end:
                i += 1


def weight_plan(before: WeightReplicas, after: WeightReplicas) -> tuple[Transfer, ...]:
    """Whole weights for every new host, each from one old host: new host number ``i`` asks old host ``i % hosts``.

    Hosts that stay have the weights already and are not listed.
    """
    plan = []
    for expert in changed_experts(before.placement, after.placement):
        old = before.placement.hosts(expert).tolist()
        new = [rank for rank in after.placement.hosts(expert).tolist() if rank not in old]
        plan += [Transfer(old[i % len(old)], rank, expert, 0, after.num_elements) for i, rank in enumerate(new)]
    return tuple(plan)


def changed_experts(before: Placement, after: Placement) -> list[int]:
    """Experts whose set of hosts differs: only their state moves."""
    differs = (before.multiplicity > 0) != (after.multiplicity > 0)
    return np.flatnonzero(differs.any(axis=0)).tolist()


def moved_elements(plan: Sequence[Transfer], num_ranks: int) -> tuple[IntArray, IntArray]:
    """``[N]`` elements that each rank sends to others, and ``[N]`` that it receives from them."""
    sent, received = np.zeros(num_ranks, dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    for t in plan:
        if t.src != t.dst:
            sent[t.src] += t.num_elements
            received[t.dst] += t.num_elements
    return sent, received
