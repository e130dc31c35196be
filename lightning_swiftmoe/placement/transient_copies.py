"""Experts that ranks with room to spare borrow for one step, where splitting tokens over the hosts cannot help.

After the exact split (``exact_split``) the ranks that are still above the mean have no host below it to pour into. Each
lends of one expert what it has too much. Lent assignments on one side and missing ones on the other are both laid out
in a row, the largest first, and a rank takes over what lies opposite to it, mostly of one expert. So the ranks are even
at once, without another round, but for what the most copies of a rank do not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement.placement import IntArray, Placement

# A copy must take over this part of a rank's mean load: a twentieth. A public trace then needs one copy in six layers
# instead of four in each, and keeps as much (docs/decisions/0020-transient-copies.md).
LEAST_PART = 20

# Assignments from which on a copy saves more than it costs, for ``transient_copies="auto"``. In bf16, on two H200 over
# NVLink, its 2 P bytes for P parameters are fetched at 330 GB/s, their gradients offered at 1350 and collected at 300;
# an assignment costs the busiest rank 6 P operations of 627 T a second (docs/decisions/0020-transient-copies.md,
# docs/results/kernels.md): 2 (1 / 330e9 + 1 / 1350e9 + 1 / 300e9) / (6 / 627e12) = 1480, whatever P is.
LEAST_COPIED = 1536


@dataclass(frozen=True, eq=False)
class WithCopies:
    """A split that also uses copies.

    Args:
        hosted: ``[N, E]`` assignments of expert ``e`` that rank ``j`` processes.
        copied: ``[N, E]`` whether rank ``j`` does that with a copy, not being a host.
    """

    hosted: IntArray
    copied: NDArray[np.bool_]


PooledSplit = Callable[[IntArray, Placement], WithCopies]
"""From ``[E]`` assignments and the placement in force: who processes how much, where the slots of a rank share room."""


def copies_worth_room(clusters: Iterable[ClusterShape]) -> int:
    """How many copies a rank should have room for: one with fewer than 8 slots, two with more; 0 if it can hold all.

    On a public trace one a rank leaves the largest rank 2 % above the mean where experts have two replicas and 7 %
    where they have 1.5, two leave 0.5 and 2 % (docs/decisions/0020-transient-copies.md).
    """
    found = [2 if cluster.slots_per_rank >= 8 else 1 for cluster in clusters if cluster.may_lack_experts]
    return max(found, default=0)


def with_copies(
    hosted: IntArray, placement: Placement, most: int, least_part: int | None = LEAST_PART, least_copied: int = 0
) -> WithCopies:
    """``hosted[N, E]`` with at most ``most`` copies on every rank; its columns keep their sums.

    Nothing changes where ranks may have none, or no rank has room for what makes a copy worth it.

    Args:
        hosted: of ``exact_split``.
        placement: of the hosts.
        most: copies on a rank.
        least_part: a copy must take over the mean rank load divided by this to be worth fetching; None: anything.
        least_copied: and so many assignments.
    """
    num_ranks, num_experts = hosted.shape
    rank_load = hosted.sum(axis=1)
    mean = -(-int(rank_load.sum()) // num_ranks)
    missing = np.maximum(mean - rank_load, 0)
    least = max(0 if least_part is None else -(-mean // least_part), least_copied)
    if not most or missing.max() < least:
        return WithCopies(hosted, np.zeros(hosted.shape, dtype=bool))
    lendable = np.minimum(hosted, np.maximum(rank_load - mean, 0)[:, None])
    # Of experts that cover as much of a surplus, one that others lend too: fewer copies then do.
    lent_expert = ((lendable << 31) + lendable.sum(axis=0)).argmax(axis=1)
    lent = lendable[np.arange(num_ranks), lent_expert]

    lent_in_all = np.bincount(lent_expert, weights=lent, minlength=num_experts).astype(np.int64)
    lending = np.lexsort((np.arange(num_ranks), lent_expert, -lent_in_all[lent_expert]))
    takers = np.argsort(-missing, kind="stable")
    opposite = np.zeros((num_ranks, num_ranks), dtype=np.int64)  # [who takes, who lends]
    opposite[np.ix_(takers, lending)] = _overlaps(missing[takers], lent[lending])

    taken = np.zeros_like(hosted)
    np.add.at(taken.T, lent_expert, opposite.T)
    hosts = placement.multiplicity > 0
    copied = _largest(np.where(hosts, 0, taken), most) & (taken >= least)
    opposite *= (copied | hosts)[:, lent_expert]
    after = hosted.copy()
    np.add.at(after.T, lent_expert, opposite.T)
    after[np.arange(num_ranks), lent_expert] -= opposite.sum(axis=0)
    return WithCopies(after, copied)


def lenders(copied: NDArray[np.bool_], placement: Placement) -> IntArray:
    """``[N, E]`` the host from which rank ``j`` has its copy of expert ``e``, -1 where it has none.

    The hosts of an expert take turns with its borrowers, both in the order of ranks.
    """
    found = np.full(copied.shape, -1, dtype=np.int64)
    for expert in np.flatnonzero(copied.any(axis=0)).tolist():
        borrowers, hosts = np.flatnonzero(copied[:, expert]), placement.hosts(expert)
        found[borrowers, expert] = hosts[np.arange(borrowers.size) % hosts.size]
    return found


def _overlaps(rows: IntArray, columns: IntArray) -> IntArray:
    """``[rows, columns]``: two rows of intervals, each laid end to end from zero, and how much any two share."""
    row_ends, column_ends = np.cumsum(rows), np.cumsum(columns)
    first = np.maximum((row_ends - rows)[:, None], (column_ends - columns)[None, :])
    last = np.minimum(row_ends[:, None], column_ends[None, :])
    return np.maximum(last - first, 0)


def _largest(amounts: IntArray, most: int) -> NDArray[np.bool_]:
    """Of every row the ``most`` largest that are not zero; of equal ones the first."""
    order = np.argsort(-amounts, axis=1, kind="stable")[:, :most]
    chosen = np.zeros(amounts.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & (amounts > 0)
