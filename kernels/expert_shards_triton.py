"""Shard moves in Triton: one pass each over memory, casts included; the twins of the functions in `expert_shards.py`.

The first axis of every grid is the long one: the others end at 65,535 programs, and experts can be larger than that.

Shape legend: N ranks, R residents, P elements of an expert, C columns of a block on the wire, B blocks, E experts.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # elements moved by one program


@triton.jit(do_not_specialize=["num_residents", "wire_before", "wire_columns", "wire_first"])
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


@triton.jit
def gather_kernel(shard, expert_ids, out, size, C, first, BLOCK: tl.constexpr):
    """`out[b, first : first + size] = shard[expert_ids[b]]`."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(1).to(tl.int64)
    expert = tl.load(expert_ids + block)
    value = tl.load(shard + expert * size + cols, mask=cols < size)
    tl.store(out + block * C + first + cols, value.to(out.dtype.element_ty), mask=cols < size)


@triton.jit(do_not_specialize=["num_blocks"])
def sum_kernel(blocks, expert_ids, total, num_blocks, size, C, first, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """`total[e] = scale * sum of blocks[b, first : first + size] with expert_ids[b] == e`, in the order of b."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(1).to(tl.int64)
    mask = cols < size
    source = blocks + first + cols
    acc = tl.zeros([BLOCK], WIDE)
    for _ in range(0, num_blocks):
        if tl.load(expert_ids) == expert:
            acc += tl.load(source, mask=mask, other=0.0).to(WIDE)
        expert_ids += 1
        source += C
    acc *= scale
    tl.store(total + expert * size + cols, acc.to(total.dtype.element_ty), mask=mask)


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
        grid = (triton.cdiv(stop - start, _BLOCK), num_residents)
        wire_kernel[grid](
            rows, wire, num_residents, num_elements, start, stop - start, before, columns, first,
            TO_WIRE=to_wire, BLOCK=_BLOCK,
        )  # fmt: skip


def launch_gather(shard: Tensor, expert_ids: Tensor, out: Tensor, first: int) -> None:
    """`gather_kernel`, one row of programs for each block."""
    size = shard.shape[1]
    grid = (triton.cdiv(size, _BLOCK), expert_ids.shape[0])
    if size:
        gather_kernel[grid](shard, expert_ids, out, size, out.shape[1], first, BLOCK=_BLOCK)


def launch_sum(blocks: Tensor, expert_ids: Tensor, total: Tensor, first: int, scale: float) -> None:
    """`sum_kernel`, one row of programs for each expert."""
    num_experts, size = total.shape
    wide = tl.float64 if blocks.dtype == torch.float64 else tl.float32
    grid = (triton.cdiv(size, _BLOCK), num_experts)
    if size:
        sum_kernel[grid](
            blocks, expert_ids, total, blocks.shape[0], size, blocks.shape[1], first, scale, WIDE=wide, BLOCK=_BLOCK
        )
