"""The two halves of the ``balanced`` policy: greedy replica counts and heaviest-first packing.

Both are defined by a loop over single replicas (the tests hold that loop); what is here gives the same answer, bit for
bit, from one operation per *expert*, so that thousands of slots take less than a millisecond. A few dozen slots take
some tens of microseconds: every layer of a step waits for its own, and there arrays cost more than plain numbers.
"""

from __future__ import annotations

import bisect
import heapq

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement.placement import IntArray

FloatArray = NDArray[np.float64]

FEW_RANKS = 64
"""Up to here one sorted list of ranks is faster than groups of them (measured with 64 experts)."""


def greedy_replicas(loads: IntArray, cluster: ClusterShape) -> IntArray:
    """``[E]`` replica counts by repeated argmax of ``load / replicas``, ties to the lowest expert.

    No expert gets more replicas than there are ranks while another could use one.
    """
    # Experts reach one replica per rank before any gets a second one there, so whole rounds need no decision.
    rounds = cluster.slots_per_rank // cluster.num_experts
    limit = (rounds + 1) * cluster.num_ranks
    counts = np.full(cluster.num_experts, max(rounds * cluster.num_ranks, 1), dtype=np.int64)
    values = np.asarray(loads, dtype=np.float64)
    # A threshold leaves up to E replicas to grant one by one: with no more than that it would gain nothing.
    if cluster.num_slots - int(counts.sum()) > cluster.num_experts:
        counts = _fill_above_threshold(values, counts, cluster.num_slots, limit)
    return _fill_one_by_one(values, counts, cluster.num_slots, limit)


def _fill_above_threshold(loads: FloatArray, counts: IntArray, num_slots: int, limit: int) -> IntArray:
    """Grant at once every replica whose ``load / replicas`` is above a bound that leaves at most E of them to grant."""
    first = counts
    while True:
        is_open = (counts < limit) & (loads > 0)
        spare = num_slots - int(counts[~is_open].sum()) - int(is_open.sum())
        if spare <= 0 or not is_open.any():
            return counts
        counts = np.where(is_open, first, counts)
        bound = float(loads[is_open].sum()) / spare
        granted = _counts_above(loads, bound, counts, is_open, limit)
        while granted.sum() > num_slots:
            # The bound is exact but for rounding and for counts that start above one.
            bound *= 1 + float(granted.sum() - num_slots) / num_slots
            granted = _counts_above(loads, bound, counts, is_open, limit)
        counts = granted
        if not (is_open & (counts >= limit)).any():
            return counts


def _counts_above(loads: FloatArray, bound: float, counts: IntArray, is_open: NDArray, limit: int) -> IntArray:
    return np.where(is_open, np.clip(1 + _num_above(loads, bound), counts, limit), counts)


def _num_above(loads: FloatArray, bound: float) -> IntArray:
    """``[E]`` how many of ``load / 1, load / 2, ...`` are above ``bound``, in floating point as the loop divides."""
    num = np.floor(loads / bound)
    while True:
        too_many = (num > 0) & (loads / np.maximum(num, 1) <= bound)
        too_few = loads / (num + 1) > bound
        if not (too_many.any() or too_few.any()):
            return num.astype(np.int64)
        num += too_few.astype(np.float64) - too_many


def _fill_one_by_one(loads: FloatArray, counts: IntArray, num_slots: int, limit: int) -> IntArray:
    left = num_slots - int(counts.sum())
    if left == 0:
        return counts
    load_of, count_of = loads.tolist(), counts.tolist()
    heap = [(-load / count, e) for e, (load, count) in enumerate(zip(load_of, count_of, strict=True)) if count < limit]
    heapq.heapify(heap)
    while left:
        value, e = heap[0]
        # Without load the lowest expert stays first until it is full.
        granted = min(left, limit - count_of[e]) if value == 0 else 1
        count_of[e] += granted
        left -= granted
        if count_of[e] == limit:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (-load_of[e] / count_of[e], e))
    return np.array(count_of, dtype=np.int64)


def pack_heaviest_first(loads: IntArray, counts: IntArray, cluster: ClusterShape) -> IntArray:
    """``[N, s]`` table: replicas by descending load, each to the least loaded rank with room, new hosts first.

    Ties go to the lowest rank.
    """
    weights = loads / counts
    order = np.argsort(-weights, kind="stable").tolist()
    ranks = _FewRanks(cluster) if cluster.num_ranks <= FEW_RANKS else _RankPool(cluster)
    weight_of, count_of = weights.tolist(), counts.tolist()
    for e in order:
        ranks.place(e, count_of[e], weight_of[e])
    return ranks.table()


class _FewRanks:
    """Ranks with room, in one list of ``(load, rank)``, ascending. All replicas of an expert weigh the same and go to
    different ranks, so they take the first of the list.
    """

    def __init__(self, cluster: ClusterShape) -> None:
        self._free = [cluster.slots_per_rank] * cluster.num_ranks
        self._rows: list[list[int]] = [[] for _ in range(cluster.num_ranks)]
        self._open = [(0.0, rank) for rank in range(cluster.num_ranks)]

    def place(self, expert: int, count: int, weight: float) -> None:
        taken = self._open[:count]
        del self._open[:count]
        for load, rank in taken:
            self._fill_slot(rank, expert, load + weight)
        self._open.sort()
        # Every rank with room hosts the expert already: one by one, to the least loaded.
        for _ in range(count - len(taken)):
            load, rank = self._open.pop(0)
            self._fill_slot(rank, expert, load + weight)
            self._open.sort()

    def _fill_slot(self, rank: int, expert: int, load: float) -> None:
        """``rank`` takes ``expert`` and then has ``load``; the list is no longer in order."""
        self._rows[rank].append(expert)
        self._free[rank] -= 1
        if self._free[rank]:
            self._open.append((load, rank))

    def table(self) -> IntArray:
        return np.array([sorted(row) for row in self._rows], dtype=np.int64)


class _RankPool:
    """What ``_FewRanks`` is, for thousands: ranks with room in groups of equal load. The replicas of an expert take the
    first ranks of the first groups: one slice per group instead of one search per replica.
    """

    def __init__(self, cluster: ClusterShape) -> None:
        self._cluster = cluster
        self._free = np.full(cluster.num_ranks, cluster.slots_per_rank)
        # Two lists side by side, ascending: bisect on the loads is several times faster than with a key.
        self._loads: list[float] = [0.0]
        self._ranks: list[IntArray] = [np.arange(cluster.num_ranks)]
        self._placed: list[tuple[int, IntArray]] = []

    def place(self, expert: int, count: int, weight: float) -> None:
        taken, left = self._take(count)
        for load, ranks in taken:
            self._placed.append((expert, ranks))
            self._insert(load + weight, self._fill_slot(ranks))
        if left:
            self._place_again(expert, left, weight)

    def _take(self, count: int) -> tuple[list[tuple[float, IntArray]], int]:
        taken, num_groups = [], 0
        for load, ranks in zip(self._loads, self._ranks, strict=True):
            if ranks.size > count:
                if count:
                    taken.append((load, ranks[:count]))
                    self._ranks[num_groups] = ranks[count:]
                    count = 0
                break
            taken.append((load, ranks))
            num_groups += 1
            count -= ranks.size
        del self._loads[:num_groups], self._ranks[:num_groups]
        return taken, count

    def _fill_slot(self, ranks: IntArray) -> IntArray:
        """The ranks that still have room afterwards."""
        free = self._free[ranks] - 1
        self._free[ranks] = free
        has_room = free > 0
        return ranks if has_room.all() else ranks[has_room]

    def _insert(self, load: float, ranks: IntArray) -> None:
        if not ranks.size:
            return
        at = bisect.bisect_left(self._loads, load)
        if at < len(self._loads) and self._loads[at] == load:
            self._ranks[at] = np.sort(np.concatenate([self._ranks[at], ranks]))
        else:
            self._loads.insert(at, load)
            self._ranks.insert(at, ranks)

    def _place_again(self, expert: int, count: int, weight: float) -> None:
        """Every rank with room hosts the expert already: one by one, to the least loaded."""
        for _ in range(count):
            load, ranks = self._loads.pop(0), self._ranks.pop(0)
            self._insert(load, ranks[1:])
            self._placed.append((expert, ranks[:1]))
            self._insert(load + weight, self._fill_slot(ranks[:1]))

    def table(self) -> IntArray:
        experts, ranks = zip(*self._placed, strict=True)
        expert = np.repeat(np.array(experts), [r.size for r in ranks])
        keys = np.sort(np.concatenate(ranks) * self._cluster.num_experts + expert)
        return (keys % self._cluster.num_experts).reshape(self._cluster.num_ranks, -1)
