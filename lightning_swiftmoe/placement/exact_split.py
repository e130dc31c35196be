"""Which host of an expert processes how much of it, on the exact loads of a step: the busiest rank gets the least.

The experts take turns. Each takes back what it gave its hosts and pours it out anew, as water over the levels that the
others left there; a step a little too far on the way (over-relaxation) gets there in half as many rounds. So the sum of
the squared rank loads falls to its minimum, which is the most even split there is: no other has a smaller largest rank,
nor keeps more where every rank has the same room. Experts that share no host do not notice each other, and take their
turn together. Integers only, so that all ranks compute the same.
"""

from __future__ import annotations

import numpy as np

from lightning_swiftmoe.placement.dispatch import host_share
from lightning_swiftmoe.placement.placement import IntArray, Placement

ROUNDS = 8
# A split is even enough, and the rounds end, where no rank is further above the mean than this part of it: half of a
# thousandth.
EVEN_ENOUGH = 2048
# 1.4 of the way in all rounds but the last: the best of 1.0, 1.2, 1.4 and 1.6 on a real trace.
FURTHER = (2, 5)


def exact_split(load: IntArray, placement: Placement, rounds: int = ROUNDS) -> IntArray:
    """``[N, E]`` assignments of expert ``e`` that rank ``j`` processes; the column of ``e`` adds up to ``load[e]``.

    Args:
        load: ``[E]`` assignments of each expert, below 2**30 together.
        placement: who hosts whom; slots of one rank with the same expert are one host.
        rounds: turns of every expert; 0 is ``host_share``, even over the slots.
    """
    quota = host_share(load, placement)
    turns = [(expert, placement.hosts(expert)) for together in turns_of(placement) for expert in together]
    pour_in_turns(quota, load, turns, rounds)
    return quota


def pour_in_turns(quota: IntArray, load: IntArray, turns: list[tuple[int, IntArray]], rounds: int = ROUNDS) -> None:
    """Change ``quota[N, E]`` in place: experts of ``turns``, beside their hosts, pour out their ``load`` anew.

    As often as there are rounds, or until the ranks are even enough.
    """
    rank_load = quota.sum(axis=1)
    mean = -(-int(rank_load.sum()) // rank_load.size)
    enough = mean + mean // EVEN_ENOUGH
    for number in range(rounds):
        if rank_load.max() <= enough:
            return
        for expert, ranks in turns:
            before = quota[ranks, expert]
            others = rank_load[ranks] - before
            after = poured(int(load[expert]), others)
            if number < rounds - 1:
                after = further(before, after)
            quota[ranks, expert] = after
            rank_load[ranks] = others + after


def turns_of(placement: Placement) -> list[list[int]]:
    """Experts with more than one host, in groups of which no two members have a host in common.

    Those with most hosts come first, and each joins the first group that it can. So there are about as many groups as
    a rank has such experts, which is the least there can be.
    """
    hosts = [placement.hosts(expert).tolist() for expert in range(placement.num_experts)]
    widest = sorted(
        (expert for expert in range(placement.num_experts) if len(hosts[expert]) > 1), key=lambda e: -len(hosts[e])
    )
    taken = [0] * placement.num_ranks  # bit g: a member of group g is there
    groups: list[list[int]] = []
    for expert in widest:
        somewhere = 0
        for rank in hosts[expert]:
            somewhere |= taken[rank]
        first_free = ~somewhere & (somewhere + 1)
        group = first_free.bit_length() - 1
        if group == len(groups):
            groups.append([])
        groups[group].append(expert)
        for rank in hosts[expert]:
            taken[rank] |= first_free
    return groups


def turn_table(placement: Placement) -> IntArray:
    """``[C, 3, N]``: the groups of ``turns_of`` as lanes of a device, of which each stands for one host of a group.

    The hosts of an expert stand side by side, ascending. By lane: ``rank * E + expert``, -1 beyond the last; where its
    expert's hosts begin and end, ``first + (last << 16)``; and by rank its lane, -1 where it has no part in the turn.
    """
    groups = turns_of(placement)
    num_ranks, num_experts = placement.num_ranks, placement.num_experts
    table = np.full((len(groups), 3, num_ranks), -1, dtype=np.int64)
    table[:, 1] = np.arange(num_ranks) * (1 + (1 << 16))
    for (pairs, spans, lanes), experts in zip(table, groups, strict=True):
        hosts = [placement.hosts(expert) for expert in experts]
        sizes = np.array([ranks.size for ranks in hosts])
        ranks = np.concatenate(hosts)
        last = np.cumsum(sizes) - 1
        pairs[: ranks.size] = ranks * num_experts + np.repeat(experts, sizes)
        spans[: ranks.size] = np.repeat(last - sizes + 1 + (last << 16), sizes)
        lanes[ranks] = np.arange(ranks.size)
    return table


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


def further(before: IntArray, after: IntArray) -> IntArray:
    """Beyond ``after`` on the way from ``before``, with the same sum; ``after`` where one would fall below zero."""
    numerator, denominator = FURTHER
    way = np.cumsum(after - before)  # ends at zero, and so does every part of it
    there = after + np.diff(way * numerator // denominator, prepend=0)
    return there if there.min() >= 0 else after
