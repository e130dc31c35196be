"""How systems in which every expert has a home even out a step: UltraEP and LLEP, from what they publish.

Both start from the counts of the very step, send copies of hot experts to ranks with room, and reduce the copies'
gradients back to the home, where the optimizer state is.
"""

from __future__ import annotations

import numpy as np

from lightning_swiftmoe.placement.placement import IntArray, Placement
from lightning_swiftmoe.placement.transient_copies import WithCopies

# LLEP's defaults: a rank takes up to the mean, copies take over 1,024 tokens at least, and nothing is done below 1.3.
LLEP_LEAST = 1024
LLEP_THRESHOLD = 1.3


def ultraep(hosted: IntArray, placement: Placement, most: int) -> WithCopies:
    """UltraEP (arXiv 2606.04101): the lowest limit that a rank's load can be kept to, by bisection.

    A limit can be kept where every rank above it, the fullest first, finds room for what is too much: from its hottest
    expert on, each time on the rank with most room that has a slot left.

    Args:
        hosted: ``[N, E]`` assignments by home.
        placement: of the homes.
        most: slots for copies on a rank.
    """
    rank_load = hosted.sum(axis=1)
    low, high = -(-int(rank_load.sum()) // placement.num_ranks), int(rank_load.max())
    while low < high:
        limit = (low + high) // 2
        if _exports(hosted, most, limit) is None:
            low = limit + 1
        else:
            high = limit
    return _with_exports(hosted, _exports(hosted, most, low) or [])


def _exports(hosted: IntArray, most: int, limit: int) -> list[tuple[int, int, int, int]] | None:
    """Who gives whom how much of which expert so that nobody is above ``limit``; None where that cannot be."""
    room = limit - hosted.sum(axis=1)
    slots = np.full(room.size, most)
    exports = []
    for home in np.argsort(room, kind="stable"):
        for expert in np.argsort(-hosted[home], kind="stable"):
            left = int(hosted[home, expert])
            takers = slots > 0
            while room[home] < 0 and left > 0:
                taker = int(np.argmax(np.where(takers, room, 0)))
                amount = min(-int(room[home]), left, int(room[taker]))
                if amount <= 0 or not takers[taker]:
                    break
                exports.append((int(home), taker, int(expert), amount))
                room[home] += amount
                room[taker] -= amount
                slots[taker] -= 1
                takers[taker] = False
                left -= amount
        if room[home] < 0:
            return None
    return exports


def llep(hosted: IntArray, placement: Placement) -> WithCopies:
    """LLEP (arXiv 2601.17111): experts, the hottest first, spill what their home has no room for.

    A home keeps what fits below the mean, beside its experts whose turn is still to come; the rest goes to the least
    loaded ranks, as much as they have room for. A spill that is smaller than ``LLEP_LEAST`` is not worth a copy: then
    the least loaded rank takes all that is left.

    Args:
        hosted: ``[N, E]`` assignments by home.
        placement: of the homes.
    """
    num_ranks = placement.num_ranks
    mean = -(-int(hosted.sum()) // num_ranks)
    if hosted.sum(axis=1).max() <= LLEP_THRESHOLD * mean:
        return _with_exports(hosted, [])
    given = np.zeros(num_ranks, dtype=np.int64)
    pending = hosted.sum(axis=1)
    exports = []
    load, home_of = hosted.sum(axis=0), hosted.argmax(axis=0)
    for expert in np.argsort(-load, kind="stable"):
        home, left = int(home_of[expert]), int(load[expert])
        pending[home] -= left
        keeps = min(left, max(mean - int(given[home] + pending[home]), 0))
        if left - keeps < LLEP_LEAST and keeps:
            keeps = left
        given[home] += keeps
        left -= keeps
        for taker in np.argsort(given + pending, kind="stable"):
            if not left:
                break
            if taker == home:
                continue
            room = mean - int(given[taker] + pending[taker])
            amount = left if min(room, left) < min(LLEP_LEAST, left) else min(room, left)
            exports.append((home, int(taker), int(expert), amount))
            given[taker] += amount
            left -= amount
    return _with_exports(hosted, exports)


def _with_exports(hosted: IntArray, exports: list[tuple[int, int, int, int]]) -> WithCopies:
    after, copied = hosted.copy(), np.zeros(hosted.shape, dtype=bool)
    for home, taker, expert, amount in exports:
        after[home, expert] -= amount
        after[taker, expert] += amount
        copied[taker, expert] = True
    return WithCopies(after, copied)
