"""Shard moves in Triton: one pass each over memory, cast included; the twins of the functions in `shards.py`.

Shape legend: N ranks, R residents, P elements of an expert, C elements of a shard, B received blocks, E experts.
"""

import triton
import triton.language as tl


@triton.jit
def pack_shards_kernel(grads, out, num_residents, P, C, BLOCK: tl.constexpr):
    """`out[j, i, :] = grads[i, j * C : (j + 1) * C]`, zeros past P. Grid: (rank, resident), column blocks."""
    pair = tl.program_id(0).to(tl.int64)
    rank, resident = pair // num_residents, pair % num_residents
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = rank * C + cols
    value = tl.load(grads + resident * P + source, mask=(cols < C) & (source < P), other=0.0)
    tl.store(out + pair * C + cols, value.to(out.dtype.element_ty), mask=cols < C)


@triton.jit
def sum_shards_kernel(blocks, expert_ids, out, num_blocks, C, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """`out[e] = sum of blocks[b] with expert_ids[b] == e`, in the order of b. Grid: experts, column blocks."""
    expert = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], WIDE)
    for _ in range(0, num_blocks):
        if tl.load(expert_ids) == expert:
            total += tl.load(blocks + cols, mask=cols < C, other=0.0).to(WIDE)
        expert_ids += 1
        blocks += C
    tl.store(out + expert * C + cols, total.to(out.dtype.element_ty), mask=cols < C)


@triton.jit
def place_shards_kernel(blocks, out, num_residents, P, C, BLOCK: tl.constexpr):
    """`out[i, p] = blocks[p // C, i, p % C]`. Grid: residents, column blocks."""
    resident = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = (element // C * num_residents + resident) * C + element % C
    value = tl.load(blocks + source, mask=element < P, other=0.0)
    tl.store(out + resident * P + element, value.to(out.dtype.element_ty), mask=element < P)
