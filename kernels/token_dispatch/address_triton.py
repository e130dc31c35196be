"""Where each assignment goes, in three kernels: experts counted in blocks, a scan over blocks, a search over hosts.

Shape legend: T tokens, k choices, R = T * k assignments in blocks of BLOCK, N ranks, E experts in a bin vector of
BINS > E (bin E takes the dropped ones).
"""

import triton
import triton.language as tl


@triton.jit
def _experts(topk_idx, at, num_assignments, E):
    expert = tl.load(topk_idx + at, mask=at < num_assignments, other=-1).to(tl.int32)
    return tl.where((expert < 0) | (expert >= E), E, expert)


@triton.jit(do_not_specialize=["num_assignments"])
def count_blocks_kernel(topk_idx, counts, firsts, num_assignments, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """`counts[block, bin]`: assignments of each expert; `firsts[block, bin]`: its first place in the sorted block."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    count = tl.histogram(_experts(topk_idx, at, num_assignments, E), BINS)
    target = block * BINS + tl.arange(0, BINS)
    tl.store(counts + target, count)
    tl.store(firsts + target, tl.cumsum(count, axis=0) - count)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_blocks_kernel(counts, firsts, num_blocks, BINS: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr):
    """`firsts` becomes what turns a place in the sorted block into a number of the expert; PART bins a program."""
    bins = tl.program_id(0) * PART + tl.arange(0, PART)
    carry = tl.zeros([PART], tl.int32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        at = block[:, None] * BINS + bins[None, :]
        live = (block < num_blocks)[:, None] & (bins < BINS)[None, :]
        count = tl.load(counts + at, mask=live, other=0)
        before = tl.cumsum(count, axis=0) - count + carry[None, :]
        inside = tl.load(firsts + at, mask=live, other=0)
        tl.store(firsts + at, before - inside, mask=live)
        carry += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["num_assignments", "max_rows"])
def address_kernel(
    topk_idx, shifts, kept, send_until, base, hosts, rows, num_assignments, max_rows, N, E,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """`hosts[a]` and `rows[a]` of every assignment, -1 where it is dropped or the host has no such row."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    # Key and lane in one integer: the sort is stable because the lanes differ.
    packed = tl.sort(_experts(topk_idx, at, num_assignments, E) * BLOCK + lane)
    expert = packed // BLOCK
    assignment = block * BLOCK + packed % BLOCK
    real = expert < E
    number = tl.load(shifts + block * BINS + expert, mask=real, other=0) + lane
    goes = real & (number < tl.load(kept + expert, mask=real, other=0))
    host = tl.zeros([BLOCK], tl.int32)
    # Halving steps to the last host before which no more than `number` assignments are sent.
    for step in tl.static_range(STEPS):
        further = host + (1 << (STEPS - 1 - step))
        inside = goes & (further < N)
        until = tl.load(send_until + further.to(tl.int64) * E + expert, mask=inside, other=2147483647)
        host = tl.where(until <= number, further, host)
    row = tl.load(base + host.to(tl.int64) * E + expert, mask=goes, other=0) + number
    goes &= (row >= 0) & (row < max_rows)
    written = assignment < num_assignments
    tl.store(hosts + assignment, tl.where(goes, host, -1), mask=written)
    tl.store(rows + assignment, tl.where(goes, row, -1), mask=written)
