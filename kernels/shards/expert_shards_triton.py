"""Shard moves in Triton: one pass each over memory, casts included; the twins of the functions in `expert_shards.py`.

The first axis of every grid is the long one: the others end at 65,535 programs, and experts can be larger than that.

Shape legend: N ranks, R residents, P elements of an expert, C columns of a block on the wire, B blocks, E experts.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_swiftmoe.kernels.launch import Launcher

_BLOCK = 2048  # elements moved by one program
_PLACES = ["start", "size", "wire_before", "wire_columns", "wire_first"]  # another for each rank and parameter


@triton.jit(do_not_specialize=["num_residents", *_PLACES])
def wire_kernel(
    rows, wire, num_residents, P, start, size, wire_before, wire_columns, wire_first,
    TO_WIRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns `start .. start + size` of `rows[R, P]` to their place for one rank on the wire, or back."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    resident = tl.program_id(1).to(tl.int64)
    mask = cols < size
    here = rows + resident * P + start + cols
    there = wire + wire_before.to(tl.int64) * num_residents + resident * wire_columns + wire_first + cols
    if TO_WIRE:
        tl.store(there, tl.load(here, mask=mask).to(wire.dtype.element_ty), mask=mask)
    else:
        tl.store(here, tl.load(there, mask=mask).to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "C", "first"])
def gather_kernel(shard, experts, out, size, C, first, BLOCK: tl.constexpr):
    """`out[b, first : first + size] = shard[experts[b]]`."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts + block)
    value = tl.load(shard + expert * size + cols, mask=cols < size)
    tl.store(out + block * C + first + cols, value.to(out.dtype.element_ty), mask=cols < size)


@triton.jit(do_not_specialize=["size", "C", "first", "scale"])
def sum_kernel(
    arrived, order, starts, total, size, C, first, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`total[e] = scale * sum of arrived[b, first : first + size]` over the blocks b of e, in their order."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(1).to(tl.int64)
    mask = cols < size
    acc = tl.zeros([BLOCK], WIDE)
    for at in range(tl.load(starts + expert), tl.load(starts + expert + 1)):
        block = tl.load(order + at)
        acc += tl.load(arrived + block * C + first + cols, mask=mask, other=0.0).to(WIDE)
    acc *= scale
    tl.store(total + expert * size + cols, acc.to(total.dtype.element_ty), mask=mask)


_wire = Launcher(wire_kernel)
_gather = Launcher(gather_kernel)
_sum = Launcher(sum_kernel)


def launch_wire(rows: Tensor, wire: Tensor, k: int, bounds: Sequence[Sequence[int]], *, to_wire: bool) -> None:
    """`wire_kernel` for the parts of parameter `k` of every rank."""
    num_residents, num_elements = rows.shape
    for rank in range(len(bounds[0]) - 1):
        start, stop = bounds[k][rank], bounds[k][rank + 1]
        if start == stop:
            continue
        before = sum(bound[rank] for bound in bounds)
        columns = sum(bound[rank + 1] - bound[rank] for bound in bounds)
        first = sum(bound[rank + 1] - bound[rank] for bound in bounds[:k])
        grid = (triton.cdiv(stop - start, _BLOCK), num_residents, 1)
        _wire(
            grid, rows, wire, num_residents, num_elements, start, stop - start, before, columns, first,
            TO_WIRE=to_wire, BLOCK=_BLOCK,
        )  # fmt: skip


def launch_gather(shard: Tensor, experts: Tensor, out: Tensor, first: int) -> None:
    """`gather_kernel`, one row of programs for each block."""
    size = shard.shape[1]
    if size:
        grid = (triton.cdiv(size, _BLOCK), experts.shape[0], 1)
        _gather(grid, shard, experts, out, size, out.shape[1], first, BLOCK=_BLOCK)


def launch_sum(arrived: Tensor, order: Tensor, starts: Tensor, total: Tensor, first: int, scale: float) -> None:
    """`sum_kernel`, one row of programs for each expert."""
    num_experts, size = total.shape
    wide = tl.float64 if arrived.dtype == torch.float64 else tl.float32
    if size:
        grid = (triton.cdiv(size, _BLOCK), num_experts, 1)
        _sum(grid, arrived, order, starts, total, size, arrived.shape[1], first, scale, WIDE=wide, BLOCK=_BLOCK)
