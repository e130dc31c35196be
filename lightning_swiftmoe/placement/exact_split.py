"""Which host of an expert processes how much of it, on the exact loads of a step: the busiest rank gets the least.

The experts take turns. Each takes back what it gave its hosts and pours it out anew, as water over the levels that the
others left there; a step a little too far on the way (over-relaxation) gets there in half as many rounds. So the sum of
the squared rank loads falls to its minimum, which is the most even split there is: no other has a smaller largest rank,
nor keeps more where every rank has the same room. Integers only, so that all ranks compute the same.
"""

from __future__ import annotations

import numpy as np

from lightning_swiftmoe.placement.dispatch import host_share
from lightning_swiftmoe.placement.placement import IntArray, Placement

ROUNDS = 8
# 1.4 of the way in all rounds but the last: the best of 1.0, 1.2, 1.4 and 1.6 on a real trace.
_STEP = (7, 5)


def exact_split(load: IntArray, placement: Placement, rounds: int = ROUNDS) -> IntArray:
    """``[N, E]`` assignments of expert ``e`` that rank ``j`` processes; the column of ``e`` adds up to ``load[e]``.

    Args:
        load: ``[E]`` assignments of each expert, below 2**31 together.
        placement: who hosts whom; slots of one rank with the same expert are one host.
        rounds: turns of every expert; 0 is ``host_share``, even over the slots.
    """
    quota = host_share(load, placement)
    hosts = [placement.hosts(expert) for expert in range(placement.num_experts)]
    # Those who can choose least go first.
    turns = sorted((expert for expert, ranks in enumerate(hosts) if ranks.size > 1), key=lambda e: hosts[e].size)
    rank_load = quota.sum(axis=1)
    for number in range(rounds):
        for expert in turns:
            ranks = hosts[expert]
            before = quota[ranks, expert]
            others = rank_load[ranks] - before
            after = poured(int(load[expert]), others)
            if number < rounds - 1:
                after = _further(before, after)
            quota[ranks, expert] = after
            rank_load[ranks] = others + after
    return quota


def poured(amount: int, levels: IntArray) -> IntArray:
    """``amount`` in integers over vessels that are filled to ``levels``, so that the highest is lowest.

    Example: 5 over levels 3, 0 and 9 give 1, 4 and 0. What does not divide goes to the first ones.
    """
    rising = np.sort(levels)
    # The level if the lowest one, two, ... vessels share it; it must reach the last of them.
    shared = (amount + np.cumsum(rising)) // np.arange(1, levels.size + 1)
    level = shared[np.flatnonzero(shared >= rising)[-1]]
    given = np.maximum(level - levels, 0)
    rest = amount - int(given.sum())
    given[np.flatnonzero(levels <= level)[:rest]] += 1
    return given


def keep_within_ranks(share: IntArray, capacity: int) -> IntArray:
    """``[N, E]`` of ``share`` that ranks with room for ``capacity`` assignments process.

    The slots of a rank pool their room. A rank over its capacity keeps exactly that many, shared out over its experts
    in proportion (cumulative rounding).
    """
    rank_load = share.sum(axis=1, keepdims=True)
    upper = np.cumsum(share, axis=1) * np.minimum(rank_load, capacity) // np.maximum(rank_load, 1)
    return np.diff(upper, axis=1, prepend=0)


def _further(before: IntArray, after: IntArray) -> IntArray:
    """From ``before`` past ``after``; none below zero, and as much in all."""
    numerator, denominator = _STEP
    there = np.maximum(before + (after - before) * numerator // denominator, 0)
    total = int(there.sum())
    if total == 0:
        return after
    upper = np.cumsum(there) * int(after.sum()) // total
    return np.diff(upper, prepend=0)
