"""The exact split in one program: ranks are lanes, and experts that share no host take their turn together.

In a turn's tables the hosts of an expert stand side by side, ascending, so sums over them are differences of one
running sum. Everything but the shares themselves stays in registers.

Shape legend: N ranks in a vector of LANES, E experts, C turns.
"""

import triton
import triton.language as tl

_COUNT_BITS = tl.constexpr(12)  # of a number of hosts, below the sum of their levels
_COUNT_MASK = tl.constexpr(4095)


@triton.jit
def _over_group(values, first, last):
    """The sum of a group's values, for each of its lanes; and the running sum before each lane, within the group."""
    until = tl.cumsum(values, axis=0)
    before = until - values
    start = tl.gather(before, first, 0)
    return tl.gather(until, last, 0) - start, before - start


@triton.jit
def _water(amount, levels, low, first, last):
    """The level that a group's amount reaches over its low lanes, how many of them come before, and what is left."""
    both = tl.where(low, (levels.to(tl.int64) << _COUNT_BITS) + 1, 0)
    total, before = _over_group(both, first, last)
    count = tl.maximum((total & _COUNT_MASK).to(tl.int32), 1)
    water = amount + (total >> _COUNT_BITS).to(tl.int32)
    level = water // count
    return level, (before & _COUNT_MASK).to(tl.int32), water - level * count


@triton.jit
def _poured(amount, levels, there, first, last):
    """`placement.exact_split.poured` for every group at once: what each lane gets of its group's amount."""
    level, place, rest = _water(amount, levels, there, first, last)
    low = there & (levels <= level)
    again = _any(there & (levels > level))
    if again > 0:  # seldom: most experts reach all of their hosts
        while again > 0:
            level, place, rest = _water(amount, levels, low, first, last)
            again = _any(low & (levels > level))
            low = low & (levels <= level)
        level, place, rest = _water(amount, levels, low, first, last)
    return tl.where(low, level - levels + (place < rest).to(tl.int32), 0)


@triton.jit
def _any(lanes):
    return tl.max(lanes.to(tl.int32), axis=0)


@triton.jit
def _further(before, after, first, last, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr):
    """`placement.exact_split.further` for every group at once."""
    change = after - before
    way = tl.cumsum(change, axis=0)  # zero where a group begins, as groups keep their sums
    there = after + _floor_part(way, NUMERATOR, DENOMINATOR) - _floor_part(way - change, NUMERATOR, DENOMINATOR)
    below = _any(there < 0)
    if below > 0:
        of_group, _ = _over_group((there < 0).to(tl.int32), first, last)
        there = tl.where(of_group > 0, after, there)
    return there


@triton.jit
def _floor_part(value, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr):
    """`floor(value * NUMERATOR / DENOMINATOR)`, where the quotient of a machine rounds towards zero."""
    product = value * NUMERATOR
    return tl.where(product < 0, product - (DENOMINATOR - 1), product) // DENOMINATOR


@triton.jit
def exact_split_kernel(
    load, share, turns, num_turns, N, E,
    ROUNDS: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, EVEN_ENOUGH: tl.constexpr,
    LANES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """`share[N, E]`, even at first, becomes the exact split of `load[E]`; `turns[C, 3, N]` is a `turn_table`."""
    lane = tl.arange(0, LANES)
    mask = lane < N
    level = tl.zeros([LANES], tl.int32)
    for experts in tl.range(0, E, EXPERTS, loop_unroll_factor=4):  # so that loads do not wait for each other
        expert = experts + tl.arange(0, EXPERTS)
        some = mask[:, None] & (expert < E)[None, :]
        level += tl.sum(tl.load(share + lane[:, None] * E + expert[None, :], mask=some, other=0), axis=1)
    mean = (tl.sum(level, axis=0) + N - 1) // N
    enough = mean + mean // EVEN_ENOUGH
    end = tl.load(num_turns)
    number = 0
    while (number < ROUNDS) & (tl.max(level, axis=0) > enough):
        for turn in range(0, end):
            table = turns + turn * 3 * N
            pair = tl.load(table + lane, mask=mask, other=-1)
            span = tl.load(table + N + lane, mask=mask, other=0)
            place = tl.load(table + 2 * N + lane, mask=mask, other=-1)
            there = pair >= 0
            first, last = span & 0xFFFF, span >> 16
            before = tl.load(share + pair, mask=there, other=0)
            amount = tl.load(load + pair % E, mask=there, other=0).to(tl.int32)
            others = tl.where(there, tl.gather(level, tl.where(there, pair // E, 0), 0) - before, 0)
            after = _poured(amount, others, there, first, last)
            if number < ROUNDS - 1:
                after = _further(before, after, first, last, NUMERATOR, DENOMINATOR)
            tl.store(share + pair, after, mask=there)
            moved = tl.gather(after - before, tl.maximum(place, 0), 0)
            level += tl.where(place >= 0, moved, 0)
            tl.debug_barrier()  # lanes that several threads stand for read what one of them wrote
        number += 1
