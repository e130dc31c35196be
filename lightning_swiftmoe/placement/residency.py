"""Who hosts whom, as a list of pairs: what a cluster of thousands of ranks needs instead of an ``[N, E]`` table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_swiftmoe.placement.placement import IntArray, Placement


@dataclass(frozen=True, eq=False)
class Residency:
    """Every (rank, expert) pair of a placement, sorted by expert, then rank. R pairs, never more than ``N * s``.

    Args:
        rank: ``[R]`` the host.
        expert: ``[R]`` the resident.
        multiplicity: ``[R]`` slots that the resident fills on this rank.
        placement: where the pairs come from.
    """

    rank: IntArray
    expert: IntArray
    multiplicity: IntArray
    placement: Placement

    @classmethod
    def of(cls, placement: Placement) -> Residency:
        """The pairs of ``placement``.

        Example: the table ``[[0, 1], [1, 1]]`` gives ranks ``[0, 0, 1]``, experts ``[0, 1, 1]``, multiplicities
        ``[1, 1, 2]``.
        """
        ranks = np.arange(placement.num_ranks)[:, None]
        keys, multiplicity = np.unique(placement.table * placement.num_ranks + ranks, return_counts=True)
        expert, rank = np.divmod(keys, placement.num_ranks)
        return cls(rank, expert, multiplicity.astype(np.int64), placement)

    @cached_property
    def num_hosts(self) -> IntArray:
        """``[E]`` ranks that host each expert."""
        return np.bincount(self.expert, minlength=self.placement.num_experts)

    @cached_property
    def num_residents(self) -> IntArray:
        """``[N]`` distinct experts on each rank; the same as ``Placement.num_residents``."""
        return np.bincount(self.rank, minlength=self.placement.num_ranks)

    @cached_property
    def _first(self) -> IntArray:
        """``[E]`` index of each expert's first pair."""
        return np.cumsum(self.num_hosts) - self.num_hosts

    @cached_property
    def host_index(self) -> IntArray:
        """``[R]`` position of the rank among the sorted hosts of its expert."""
        return np.arange(self.rank.size) - self._first[self.expert]

    @cached_property
    def _slots_until(self) -> IntArray:
        """``[R]`` slots of the expert on this rank and on all hosts before it."""
        total = np.cumsum(self.multiplicity)
        before = total[self._first] - self.multiplicity[self._first]
        return total - before[self.expert]

    def share(self, load: IntArray) -> IntArray:
        """``[R]`` assignments each pair processes when ``load[e]`` spread evenly over the replicas of ``e``.

        The same numbers as ``host_share(load, placement)``, which is ``[N, E]`` and mostly zeros.
        """
        replicas = self.placement.replicas[self.expert]
        upper = self._slots_until * load[self.expert] // replicas
        before = (self._slots_until - self.multiplicity) * load[self.expert] // replicas
        return upper - before

    def sum_by_rank(self, values: np.ndarray) -> np.ndarray:
        """``[N]`` sums of one value per pair."""
        return np.bincount(self.rank, weights=values, minlength=self.placement.num_ranks)
