"""How systems in which every expert has a home even out a step: UltraEP and LLEP, as their code has it.

Both plan from the counts of the very step and send copies of hot experts to ranks with room; the copies' gradients go
back to the home, where the optimizer state is. Everywhere ``load`` is ``[E]`` assignments of the step, and
``placement`` gives every expert one slot.
"""

from __future__ import annotations

import numpy as np

from lightning_swiftmoe.placement.placement import IntArray, Placement
from lightning_swiftmoe.placement.transient_copies import WithCopies

# UltraEP (github.com/Dots-Infra/UltraEP, v1.0.0). Slots for copies on a rank: what its example recipes and its tests
# take; the library itself has no default. The others: README, "Replication planning".
ULTRAEP_SLOTS = 2
ULTRAEP_LEAST = 1024  # ULTRA_EP_QUOTA_MIN_TOKENS_PER_REPLICA
ULTRAEP_TOLERANCE = 0.01  # ULTRA_EP_QUOTA_ORACLE_EPS
PROBES = 4

# LLEP's lambda and m (arXiv 2601.17111, section 5.1); its alpha is 1.
LLEP_THRESHOLD = 1.3
LLEP_LEAST = 1024


def ultraep(
    load: IntArray,
    placement: Placement,
    most: int = ULTRAEP_SLOTS,
    least: int = ULTRAEP_LEAST,
    tolerance: float = ULTRAEP_TOLERANCE,
) -> WithCopies:
    """UltraEP (arXiv 2606.04101; csrc/kernels/placement.cu): a limit that every rank's load is kept to.

    First it tries the mean with the tolerance, and twice a hundredth of the largest load more, with copies of any size;
    then it searches the lowest limit, with copies of ``least`` at least. It copies within an NVLink domain only, which
    all ranks are taken to share.

    Args:
        load: assignments.
        placement: of the homes.
        most: slots for copies on a rank.
        least: assignments that a copy takes over, where the first limits are too low.
        tolerance: above the mean, as part of it.
    """
    mean, largest = _mean_and_largest(load, placement)
    limit = int(np.ceil(mean * (1 + tolerance)))
    for _ in range(3):
        split = keep_below(limit, load, placement, most)
        if split is not None:
            return split
        limit = min(largest, limit + -(-largest // 100))
    split = keep_below(lowest_limit(load, placement, most, least), load, placement, most, least)
    assert split is not None
    return split


def lowest_limit(load: IntArray, placement: Placement, most: int, least: int) -> int:
    """The mean, or what a search by UltraEP's four probes at once finds between it and the largest load.

    Where copies must be of some size, a limit can be kept although a higher one cannot: then it need not be the lowest.
    """
    low, high = _mean_and_largest(load, placement)
    if keep_below(low, load, placement, most, least) is not None:
        return low
    low += 1
    while low < high:
        probes = _probes(low, high)
        kept = [limit for limit in probes if keep_below(limit, load, placement, most, least) is not None]
        high = min(kept, default=high)
        low = 1 + max((limit for limit in probes if limit < high), default=low - 1)
    return high


def _probes(low: int, high: int) -> list[int]:
    """Limits from ``low`` on and below ``high``: all where they are few."""
    apart = high - low
    if apart <= PROBES:
        return list(range(low, high))
    return [low + apart * part // (PROBES + 1) for part in range(1, PROBES + 1)]


def keep_below(
    limit: int, load: IntArray, placement: Placement, most: int, least: int | None = None
) -> WithCopies | None:
    """A split in which no rank has more than ``limit``; None where UltraEP's greedy choice finds none.

    The ranks above it, the fullest first, lend of their experts, the hottest first.

    Args:
        limit: assignments of a rank.
        load: assignments.
        placement: of the homes.
        most: slots for copies on a rank.
        least: assignments that a copy takes over. None: an equal part of the excess for all that could take some.
    """
    split = at_home(load, placement)
    rank_load = split.hosted.sum(axis=1)
    room, slots = np.maximum(limit - rank_load, 0), np.full(rank_load.size, most)
    for home in np.argsort(-rank_load, kind="stable"):
        excess = int(rank_load[home]) - limit
        for expert in sorted(placement.residents(home), key=lambda resident: -load[resident]):
            excess = _lend(split, int(expert), int(home), excess, room, slots, least)
        if excess > 0:
            return None
    return split


def _lend(
    split: WithCopies, expert: int, home: int, excess: int, room: IntArray, slots: IntArray, least: int | None
) -> int:
    """Give ``excess`` of an expert, but for one assignment, to the ranks with most room; what is left of it."""
    while excess > 0:
        left = int(split.hosted[home, expert]) - 1
        offers = np.minimum(room, min(excess, left))
        offers[(slots == 0) | split.copied[:, expert]] = 0
        takers = int(np.count_nonzero(offers > 0))
        if not takers:
            break
        floor = -(-excess // takers) if least is None else least
        if offers.max() < floor:
            break
        taker = int(np.where(offers >= floor, room, 0).argmax())
        amount = int(offers[taker])
        _move(split, expert, home, taker, amount)
        room[taker] -= amount
        slots[taker] -= 1
        excess -= amount
    return excess


def llep(load: IntArray, placement: Placement, least: int = LLEP_LEAST) -> WithCopies:
    """LLEP (arXiv 2601.17111, Algorithms 2 and 3): experts, the hottest first, spill what their home has no room for.

    A home keeps what fits below the mean beside its experts whose turn is still to come. The rest goes to the least
    loaded rank: as much as fits there, or all where that is less than ``least``. Nothing is done below a largest rank
    of ``LLEP_THRESHOLD`` times the mean. (Section 4 says that a small excess stays at home; neither the algorithms nor
    the authors' code, github.com/SalesforceAIResearch/LeastLoadedEP, do that.)

    Args:
        load: assignments.
        placement: of the homes.
        least: assignments that are worth a copy.
    """
    split = at_home(load, placement)
    rank_load = split.hosted.sum(axis=1)  # with what experts whose turn is to come have at home
    if not rank_load.max() >= LLEP_THRESHOLD * rank_load.mean() > 0:
        return split
    mean = int(load.sum()) // placement.num_ranks
    for expert in np.argsort(-load, kind="stable"):
        home = int(placement.hosts(expert)[0])
        excess = min(int(load[expert]), max(int(rank_load[home]) - mean, 0))
        rank_load[home] -= excess
        _spill(split, int(expert), home, excess, rank_load, mean, least)
    return split


def _spill(split: WithCopies, expert: int, home: int, excess: int, rank_load: IntArray, mean: int, least: int) -> None:
    others = np.arange(rank_load.size) != home
    while excess > 0:
        taker = int(np.where(others, rank_load, np.iinfo(np.int64).max).argmin())
        fits = min(excess, mean - int(rank_load[taker]))
        amount = fits if fits >= min(least, excess) else excess
        _move(split, expert, home, taker, amount)
        rank_load[taker] += amount
        excess -= amount


def at_home(load: IntArray, placement: Placement) -> WithCopies:
    """Every expert where its home is, no copies."""
    hosted = placement.multiplicity * load
    return WithCopies(hosted, np.zeros(hosted.shape, dtype=bool))


def _move(split: WithCopies, expert: int, home: int, taker: int, amount: int) -> None:
    split.hosted[home, expert] -= amount
    split.hosted[taker, expert] += amount
    split.copied[taker, expert] = True


def _mean_and_largest(load: IntArray, placement: Placement) -> tuple[int, int]:
    """Of the ranks' loads, the mean rounded up."""
    rank_load = at_home(load, placement).hosted.sum(axis=1)
    return -(-int(load.sum()) // rank_load.size), int(rank_load.max())
