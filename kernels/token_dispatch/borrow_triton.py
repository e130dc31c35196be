"""Transient copies in one program: `placement.transient_copies`, ranks as lanes beside a few other ranks at a time.

No sorting: where a rank's lent or missing amount begins in its row is the sum of those that come before it, each found
by comparing. Ranks that lend of the same expert stand side by side in that row, so what a rank takes of an expert is
one overlap.

Shape legend: N ranks in a vector of LANES, E experts, COLUMNS other ranks at a time.
"""

import triton
import triton.language as tl

_NONE = tl.constexpr(0xFFFF)  # no expert has this number


@triton.jit
def _precedes(amount, other_amount, expert, other_expert):
    """Whether the other expert, of which so much is lent in all, comes first in the row of what is lent."""
    return (other_amount > amount) | ((other_amount == amount) & (other_expert < expert))


@triton.jit
def _overlap(start, end, other_start, other_end):
    return tl.maximum(tl.minimum(end, other_end) - tl.maximum(start, other_start), 0)


@triton.jit
def _mean_and_level(share, N, E, LANES: tl.constexpr, EXPERTS: tl.constexpr):
    """The mean rank load, rounded up, and every rank's."""
    lane = tl.arange(0, LANES)
    level = tl.zeros([LANES], tl.int32)
    for experts in tl.range(0, E, EXPERTS, loop_unroll_factor=4):
        expert = experts + tl.arange(0, EXPERTS)
        some = (lane < N)[:, None] & (expert < E)[None, :]
        level += tl.sum(tl.load(share + lane[:, None] * E + expert[None, :], mask=some, other=0), axis=1)
    return (tl.sum(level, axis=0) + N - 1) // N, level


@triton.jit
def _lent(share, surplus, N, E, LANES: tl.constexpr, EXPERTS: tl.constexpr):
    """Of which expert every rank lends, and how much: of those that cover most, the one that all lend most of."""
    lane = tl.arange(0, LANES)
    best = tl.full([LANES], -1, tl.int64)
    best_expert = tl.zeros([LANES], tl.int32)
    for experts in range(0, E, EXPERTS):
        expert = experts + tl.arange(0, EXPERTS)
        some = (lane < N)[:, None] & (expert < E)[None, :]
        value = tl.load(share + lane[:, None] * E + expert[None, :], mask=some, other=0)
        lendable = tl.minimum(value, surplus[:, None])
        key = (lendable.to(tl.int64) << 31) + tl.sum(lendable, axis=0)[None, :]
        key = tl.where(some, key, -1)
        highest = tl.max(key, axis=1)
        first = tl.min(tl.where(key == highest[:, None], expert[None, :], _NONE), axis=1)
        best_expert = tl.where(highest > best, first, best_expert)
        best = tl.maximum(best, highest)
    return best_expert, tl.where(lane < N, best >> 31, 0).to(tl.int32)


@triton.jit(do_not_specialize=["least_copied"])
def borrow_kernel(
    share, multiplicity, copies, lenders, notes, N, E, least_copied,
    MOST: tl.constexpr, LEAST_PART: tl.constexpr,
    LANES: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`share[N, E]`, an exact split, changes by what ranks borrow: `copies[N, MOST]`, from `lenders[N, MOST]`.

    `notes[7, N]` is for what lanes tell each other.
    """
    lane = tl.arange(0, LANES)
    mask = lane < N
    mean, level = _mean_and_level(share, N, E, LANES, EXPERTS)
    missing = tl.where(mask, tl.maximum(mean - level, 0), 0)
    for number in tl.static_range(MOST):
        tl.store(copies + lane * MOST + number, tl.full([LANES], -1, tl.int32), mask=mask)
        tl.store(lenders + lane * MOST + number, tl.full([LANES], -1, tl.int32), mask=mask)
    least = tl.maximum((mean + LEAST_PART - 1) // LEAST_PART, least_copied)
    tl.debug_barrier()
    if tl.max(missing, axis=0) >= least:
        surplus = tl.where(mask, tl.maximum(level - mean, 0), 0)
        _share_anew(share, multiplicity, copies, notes, missing, surplus, least, N, E, MOST, LANES, EXPERTS, COLUMNS)
        for number in tl.static_range(MOST):
            _find_lenders(multiplicity, copies, lenders, number, N, E, MOST, LANES, COLUMNS)


@triton.jit
def _share_anew(
    share, multiplicity, copies, notes, missing, surplus, least, N, E,
    MOST: tl.constexpr, LANES: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Choose copies, and move what they and the hosts take over."""
    lane = tl.arange(0, LANES)
    mask = lane < N
    expert, lent = _lent(share, surplus, N, E, LANES, EXPERTS)
    tl.store(notes + lane, missing, mask=mask)
    tl.store(notes + N + lane, expert, mask=mask)
    tl.store(notes + 2 * N + lane, lent, mask=mask)
    tl.debug_barrier()

    in_all = tl.zeros([LANES], tl.int32)
    earlier = tl.zeros([LANES], tl.int32)  # ranks before this one that lend of its expert
    taker_start = tl.zeros([LANES], tl.int32)
    own_start = tl.zeros([LANES], tl.int32)
    for columns in range(0, N, COLUMNS):
        other = columns + tl.arange(0, COLUMNS)
        there = other < N
        other_missing = tl.load(notes + other, mask=there, other=0)[None, :]
        other_expert = tl.load(notes + N + other, mask=there, other=-1)[None, :]
        other_lent = tl.load(notes + 2 * N + other, mask=there, other=0)[None, :]
        before = other[None, :] < lane[:, None]
        same = other_expert == expert[:, None]
        in_all += tl.sum(tl.where(same, other_lent, 0), axis=1)
        earlier += tl.sum((same & before).to(tl.int32), axis=1)
        own_start += tl.sum(tl.where(same & before, other_lent, 0), axis=1)
        first = (other_missing > missing[:, None]) | ((other_missing == missing[:, None]) & before)
        taker_start += tl.sum(tl.where(first, other_missing, 0), axis=1)
    tl.store(notes + 3 * N + lane, in_all, mask=mask)
    tl.store(notes + 6 * N + lane, (earlier == 0).to(tl.int32), mask=mask)
    tl.debug_barrier()

    group_start = tl.zeros([LANES], tl.int32)
    for columns in range(0, N, COLUMNS):
        other = columns + tl.arange(0, COLUMNS)
        there = other < N
        other_expert = tl.load(notes + N + other, mask=there, other=-1)[None, :]
        other_lent = tl.load(notes + 2 * N + other, mask=there, other=0)[None, :]
        other_in_all = tl.load(notes + 3 * N + other, mask=there, other=0)[None, :]
        first = _precedes(in_all[:, None], other_in_all, expert[:, None], other_expert)
        group_start += tl.sum(tl.where(first, other_lent, 0), axis=1)
    tl.store(notes + 4 * N + lane, group_start, mask=mask)
    tl.store(notes + 5 * N + lane, group_start + own_start, mask=mask)
    tl.debug_barrier()

    start, end = taker_start[:, None], (taker_start + missing)[:, None]
    last = tl.full([LANES], 1 << 62, tl.int64)
    for number in tl.static_range(MOST):
        best = tl.full([LANES], -1, tl.int64)
        for columns in range(0, N, COLUMNS):
            other = columns + tl.arange(0, COLUMNS)
            there = other < N
            other_expert = tl.load(notes + N + other, mask=there, other=0)[None, :]
            other_start = tl.load(notes + 4 * N + other, mask=there, other=0)[None, :]
            other_end = other_start + tl.load(notes + 3 * N + other, mask=there, other=0)[None, :]
            stands_for = tl.load(notes + 6 * N + other, mask=there, other=0)[None, :] > 0
            hosts = tl.load(
                multiplicity + lane[:, None] * E + other_expert, mask=mask[:, None] & there[None, :], other=1
            )
            amount = _overlap(start, end, other_start, other_end)
            key = (amount.to(tl.int64) << 16) | (other_expert ^ _NONE)
            fits = stands_for & (hosts == 0) & (amount >= least) & (amount > 0) & (key < last[:, None])
            best = tl.maximum(best, tl.max(tl.where(fits, key, -1), axis=1))
        chosen = tl.where(best >= 0, ((best & _NONE) ^ _NONE).to(tl.int32), -1)
        tl.store(copies + lane * MOST + number, chosen, mask=mask)
        last = best
    tl.debug_barrier()

    for columns in range(0, N, COLUMNS):
        other = columns + tl.arange(0, COLUMNS)
        there = other < N
        other_expert = tl.load(notes + N + other, mask=there, other=0)[None, :]
        other_lent = tl.load(notes + 2 * N + other, mask=there, other=0)[None, :]
        group = tl.load(notes + 4 * N + other, mask=there, other=0)[None, :]
        group_end = group + tl.load(notes + 3 * N + other, mask=there, other=0)[None, :]
        own = tl.load(notes + 5 * N + other, mask=there, other=0)[None, :]
        stands_for = tl.load(notes + 6 * N + other, mask=there, other=0)[None, :] > 0
        both = mask[:, None] & there[None, :]
        takes = tl.load(multiplicity + lane[:, None] * E + other_expert, mask=both, other=0) > 0
        for number in tl.static_range(MOST):
            chosen = tl.load(copies + lane * MOST + number, mask=mask, other=-1)
            takes = takes | (chosen[:, None] == other_expert)
        more = tl.where(takes & stands_for & both, _overlap(start, end, group, group_end), 0)
        place = share + lane[:, None] * E + other_expert
        tl.store(place, tl.load(place, mask=more > 0, other=0) + more, mask=more > 0)
        gone = tl.sum(tl.where(takes & both, _overlap(start, end, own, own + other_lent), 0), axis=0)
        tl.store(notes + other, gone, mask=there)
    tl.debug_barrier()
    gone = tl.load(notes + lane, mask=mask, other=0)
    place = share + lane * E + expert
    tl.store(place, tl.load(place, mask=gone > 0, other=0) - gone, mask=gone > 0)


@triton.jit
def _find_lenders(
    multiplicity, copies, lenders, number, N, E, MOST: tl.constexpr, LANES: tl.constexpr, COLUMNS: tl.constexpr
):
    """The hosts of an expert take turns with its borrowers, both in the order of ranks."""
    lane = tl.arange(0, LANES)
    chosen = tl.load(copies + lane * MOST + number, mask=lane < N, other=-1)
    wants = chosen >= 0
    expert = tl.maximum(chosen, 0)
    earlier = tl.zeros([LANES], tl.int32)
    num_hosts = tl.zeros([LANES], tl.int32)
    for columns in range(0, N, COLUMNS):
        other = columns + tl.arange(0, COLUMNS)
        there = other < N
        for also in tl.static_range(MOST):
            theirs = tl.load(copies + other * MOST + also, mask=there, other=-1)[None, :]
            earlier += tl.sum(((theirs == chosen[:, None]) & (other[None, :] < lane[:, None])).to(tl.int32), axis=1)
        both = wants[:, None] & there[None, :]
        hosts = tl.load(multiplicity + other[None, :] * E + expert[:, None], mask=both, other=0) > 0
        num_hosts += tl.sum(hosts.to(tl.int32), axis=1)
    turn = earlier % tl.maximum(num_hosts, 1)
    seen = tl.zeros([LANES], tl.int32)
    lender = tl.full([LANES], -1, tl.int32)
    for columns in range(0, N, COLUMNS):
        other = columns + tl.arange(0, COLUMNS)
        both = wants[:, None] & (other < N)[None, :]
        hosts = (tl.load(multiplicity + other[None, :] * E + expert[:, None], mask=both, other=0) > 0).to(tl.int32)
        place = seen[:, None] + tl.cumsum(hosts, axis=1) - hosts
        lender = tl.maximum(
            lender, tl.max(tl.where((hosts > 0) & (place == turn[:, None]), other[None, :], -1), axis=1)
        )
        seen += tl.sum(hosts, axis=1)
    tl.store(lenders + lane * MOST + number, lender, mask=lane < N)
