"""Shard moves in Triton: one pass each over memory, cast included; the twins of the functions in `shards.py`.

The blocks of columns stand in x of every grid: only there does CUDA take more than 65,535, and a large expert has them.

Shape legend: N ranks, R residents, P elements of an expert, C elements of a shard, B received blocks, E experts.
"""

import triton
import triton.language as tl

from lightning_swiftmoe.kernels.launch import Launcher


@triton.jit(do_not_specialize=["num_residents"])
def pack_shards_kernel(grads, out, num_residents, P, C, BLOCK: tl.constexpr):
    """`out[j, i, :] = grads[i, j * C : (j + 1) * C]`, zeros past P. Grid: column blocks, residents, ranks."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    resident = tl.program_id(1).to(tl.int64)
    rank = tl.program_id(2).to(tl.int64)
    pair = rank * num_residents + resident
    source = rank * C + cols
    value = tl.load(grads + resident * P + source, mask=(cols < C) & (source < P), other=0.0)
    tl.store(out + pair * C + cols, value.to(out.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=["num_blocks"])
def sum_shards_kernel(blocks, expert_ids, out, num_blocks, C, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """`out[e] = sum of blocks[b] with expert_ids[b] == e`, in the order of b. Grid: column blocks, experts."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], WIDE)
    for _ in range(0, num_blocks):
        if tl.load(expert_ids) == expert:
            total += tl.load(blocks + cols, mask=cols < C, other=0.0).to(WIDE)
        expert_ids += 1
        blocks += C
    tl.store(out + expert * C + cols, total.to(out.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=["num_residents"])
def place_shards_kernel(blocks, out, num_residents, P, C, BLOCK: tl.constexpr):
    """`out[i, p] = blocks[p // C, i, p % C]`. Grid: column blocks, residents."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    resident = tl.program_id(1).to(tl.int64)
    source = (element // C * num_residents + resident) * C + element % C
    value = tl.load(blocks + source, mask=element < P, other=0.0)
    tl.store(out + resident * P + element, value.to(out.dtype.element_ty), mask=element < P)


pack_shards = Launcher(pack_shards_kernel)
sum_shards = Launcher(sum_shards_kernel)
place_shards = Launcher(place_shards_kernel)
