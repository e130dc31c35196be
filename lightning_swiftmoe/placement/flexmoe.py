"""FlexMoE's scheduler (arXiv 2304.03946) as a placement policy: a baseline whose optimizer state moves with experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement.placement import IntArray, Placement

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FlexMoECosts:
    """What a step costs, in seconds. Only ratios matter to the scheduler.

    Args:
        token_s: computing one assignment, forward and backward.
        token_exchange_s: moving one assignment once; a step moves it four times (dispatch and combine, and back).
        sync_s: all-reducing one expert's gradient on one host, when the expert has more than one.
    """

    token_s: float = 1.0
    token_exchange_s: float = 0.0
    sync_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("token_s", "token_exchange_s", "sync_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class FlexMoEPolicy:
    """Move one replica at a time from the idlest to the busiest expert, while the modelled step gets cheaper.

    With ``cap_e = load_e / replicas_e``: while max/mean load of the ranks is above ``threshold``, the expert with the
    smallest ``cap`` and more than one replica gives one to the expert with the largest. Then slots are swapped so that
    the replicas of the receiver sit together, if that is cheaper. The first change that does not pay is undone and
    ends the search. A change pays when the modelled cost falls, or stays the same while the largest ``cap`` falls: the
    busiest expert need not sit on the slowest rank. Ties go to the lowest expert, rank and slot.

    Args:
        threshold: max/mean rank load that is tolerated; 1.0 always tries (a forced interval).
        costs: the cost model.
    """

    threshold: float = 1.0
    costs: FlexMoECosts = FlexMoECosts()

    def __post_init__(self) -> None:
        if self.threshold < 1:
            raise ValueError(f"threshold is a max/mean load and cannot be below 1, got {self.threshold}")

    def __call__(self, loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
        """The next placement; ``previous`` itself when nothing pays."""
        if loads.sum() == 0:
            return previous
        state = _Table(previous.table, np.asarray(loads, dtype=np.float64), self.costs)
        while state.imbalance() > self.threshold:
            better = self._moved(state)
            if better is None or not better.rating() < state.rating():
                break
            state = better
        if np.array_equal(state.table, previous.table):
            return previous
        return Placement(state.table, cluster.num_experts)

    def _moved(self, state: _Table) -> _Table | None:
        """One replica moved from the idlest to the busiest expert, then the cheapest swap; None if nobody can give."""
        cap = state.loads / state.replicas
        giver = int(np.argmin(np.where(state.replicas > 1, cap, np.inf)))
        taker = int(np.argmax(cap))
        if state.replicas[giver] < 2 or giver == taker:
            return None
        rank, slot = state.slot_on_idlest_rank(giver)
        moved = state.with_expert(rank, slot, taker)
        return min([moved, *moved.swaps_towards_peers(rank, slot)], key=lambda table: table.cost())


class _Table:
    """A slot table with its loads: a value, changed by making another."""

    def __init__(self, table: IntArray, loads: FloatArray, costs: FlexMoECosts) -> None:
        self.table, self.loads, self.costs = table, loads, costs
        self.replicas = np.bincount(table.ravel(), minlength=loads.size)
        per_slot = (loads / np.maximum(self.replicas, 1))[table]
        self.rank_load: FloatArray = per_slot.sum(axis=1)

    def imbalance(self) -> float:
        return float(self.rank_load.max() / self.rank_load.mean())

    def rating(self) -> tuple[float, float]:
        """What must fall: the modelled cost, then the largest load per replica."""
        return self.cost(), float((self.loads / self.replicas).max())

    def cost(self) -> float:
        """Seconds of the slowest rank: its assignments, and one gradient sync per resident that lives elsewhere too."""
        per_token = self.costs.token_s + 4 * self.costs.token_exchange_s
        return float((self.rank_load * per_token + self._synced_residents() * self.costs.sync_s).max())

    def _synced_residents(self) -> FloatArray:
        if self.costs.sync_s == 0:
            return np.zeros(len(self.table))
        ordered = np.sort(self.table, axis=1)
        is_first = np.ones_like(ordered, dtype=bool)
        is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        hosts = np.bincount(ordered[is_first], minlength=self.loads.size)
        return (is_first & (hosts[ordered] > 1)).sum(axis=1)

    def slot_on_idlest_rank(self, expert: int) -> tuple[int, int]:
        ranks, slots = np.nonzero(self.table == expert)
        best = int(np.argmin(self.rank_load[ranks]))
        return int(ranks[best]), int(slots[best])

    def with_expert(self, rank: int, slot: int, expert: int) -> _Table:
        table = self.table.copy()
        table[rank, slot] = expert
        return _Table(table, self.loads, self.costs)

    def swaps_towards_peers(self, rank: int, slot: int) -> list[_Table]:
        """The expert in this slot exchanged with one slot of the idlest other rank that hosts it already."""
        expert = self.table[rank, slot]
        hosts = np.flatnonzero((self.table == expert).any(axis=1))
        hosts = hosts[hosts != rank]
        if hosts.size == 0:
            return []
        host = int(hosts[np.argmin(self.rank_load[hosts])])
        swaps = []
        for other in np.flatnonzero(self.table[host] != expert):
            table = self.table.copy()
            table[rank, slot], table[host, other] = table[host, other], expert
            swaps.append(_Table(table, self.loads, self.costs))
        return swaps
