"""Routing metadata: block histograms, one prefix and a stable scatter, or one kernel for a single block. No waits.

Shape legend: R assignments in blocks of BLOCK, E experts in a bin vector of BINS > E (bin E takes the dropped ones),
P rows of the padded layout, in which every expert takes whole tiles of TILE rows.

Integers that change from step to step are marked `do_not_specialize`, here and in all modules of kernels: Triton would
compile anew for those that are 1 or a multiple of 16.
"""

import triton
import triton.language as tl

from lightning_swiftmoe.kernels.launch import Launcher


@triton.jit
def _keys(topk_idx, at, num_assignments, num_experts):
    expert = tl.load(topk_idx + at, mask=at < num_assignments, other=-1).to(tl.int32)
    return tl.where((expert < 0) | (expert >= num_experts), num_experts, expert)


@triton.jit(do_not_specialize=["num_assignments"])
def histogram_kernel(topk_idx, histograms, num_assignments, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """`histograms[block, bin]`: assignments of the block that name each expert."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    counts = tl.histogram(_keys(topk_idx, at, num_assignments, num_experts), BINS)
    tl.store(histograms + block * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_blocks"])
def prefix_kernel(
    histograms,
    offsets,
    starts,
    ends,
    num_blocks,
    num_experts,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Where each block's run of each expert starts, less the run's place inside the sorted block; one program.

    `starts[e]` and `ends[e]` bound each expert's real rows; `starts[E]` is the end of the last tile of all.
    """
    bins = tl.arange(0, BINS)
    carry = tl.zeros([BINS], tl.int32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        at = block[:, None] * BINS + bins[None, :]
        live = (block < num_blocks)[:, None]
        counts = tl.load(histograms + at, mask=live, other=0)
        before = tl.cumsum(counts, axis=0) - counts + carry[None, :]
        inside = tl.cumsum(counts, axis=1) - counts
        tl.store(offsets + at, before - inside, mask=live)
        carry += tl.sum(counts, axis=0)
    real = tl.where(bins < num_experts, carry, 0)
    padded = (real + TILE - 1) // TILE * TILE
    start = tl.cumsum(padded, axis=0) - padded
    kept = bins < num_experts
    tl.store(starts + bins, start, mask=bins <= num_experts)
    tl.store(ends + bins, start + real, mask=kept)


@triton.jit
def _place(
    topk_idx, offsets, starts, inverse, order, block, num_assignments, num_experts,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    # Key and lane in one integer: the sort is stable because the lanes differ.
    packed = tl.sort(_keys(topk_idx, at, num_assignments, num_experts) * BLOCK + lane)
    expert = packed // BLOCK
    assignment = block * BLOCK + packed % BLOCK
    kept = expert < num_experts
    row = tl.load(offsets + block * BINS + expert, mask=kept, other=0) + lane
    row += tl.load(starts + expert, mask=kept, other=0)
    tl.store(inverse + assignment, tl.where(kept, row, -1), mask=assignment < num_assignments)
    tl.store(order + row, assignment, mask=kept)


@triton.jit
def _owner_among(start, tile, TILE: tl.constexpr):
    # Empty experts share their successor's start: the last expert that starts at or before the tile owns it.
    return tl.maximum(tl.sum((start[None, :] <= (tile * TILE)[:, None]).to(tl.int32), axis=1) - 1, 0)


@triton.jit
def _owner(starts, tile, num_experts, TILE: tl.constexpr, BINS: tl.constexpr):
    bins = tl.arange(0, BINS)
    return _owner_among(tl.load(starts + bins, mask=bins < num_experts, other=2147483647), tile, TILE)


@triton.jit
def _name_tiles(
    starts, ends, order, tile_expert, group, num_experts, num_tiles,
    TILE: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tile = group * TILES + tl.arange(0, TILES)
    expert = _owner(starts, tile, num_experts, TILE, BINS)
    tl.store(tile_expert + tile, expert, mask=tile < num_tiles)
    row = (tile * TILE)[:, None] + tl.arange(0, TILE)[None, :]
    padding = row >= tl.load(ends + expert)[:, None]
    tl.store(order + row, tl.full([TILES, TILE], -1, tl.int32), mask=padding & (tile < num_tiles)[:, None])


@triton.jit(do_not_specialize=["num_assignments", "num_blocks", "num_tiles"])
def scatter_kernel(
    topk_idx, offsets, starts, ends, inverse, order, tile_expert, num_assignments, num_experts, num_blocks,
    num_tiles, TILE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Place every assignment; the programs past the blocks name each tile's expert and mark its padding instead."""
    block = tl.program_id(0)
    if block < num_blocks:
        _place(topk_idx, offsets, starts, inverse, order, block, num_assignments, num_experts, BLOCK, BINS)
    else:
        _name_tiles(starts, ends, order, tile_expert, block - num_blocks, num_experts, num_tiles, TILE, BINS, TILES)


@triton.jit(do_not_specialize=["num_assignments", "num_tiles"])
def route_block_kernel(
    topk_idx, starts, ends, inverse, order, tile_expert, num_assignments, num_experts, num_tiles,
    TILE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """All that the three kernels above do, by one program: for at most BLOCK assignments three launches take longer."""
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    packed = tl.sort(_keys(topk_idx, lane, num_assignments, num_experts) * BLOCK + lane)
    expert = packed // BLOCK
    assignment = packed % BLOCK
    counts = tl.histogram(expert, BINS)
    real = tl.where(bins < num_experts, counts, 0)
    padded = (real + TILE - 1) // TILE * TILE
    start = tl.cumsum(padded, axis=0) - padded
    end = start + real
    tl.store(starts + bins, start, mask=bins <= num_experts)
    tl.store(ends + bins, end, mask=bins < num_experts)

    before = tl.cumsum(counts, axis=0) - counts
    row = tl.gather(start - before, expert, 0) + lane
    kept = expert < num_experts
    tl.store(inverse + assignment, tl.where(kept, row, -1), mask=assignment < num_assignments)
    tl.store(order + row, assignment, mask=kept)

    first = tl.where(bins < num_experts, start, 2147483647)
    for group in range(0, tl.cdiv(num_tiles, TILES)):
        tile = group * TILES + tl.arange(0, TILES)
        owner = _owner_among(first, tile, TILE)  # loads would have to wait for the stores above
        tl.store(tile_expert + tile, owner, mask=tile < num_tiles)
        padding_row = (tile * TILE)[:, None] + tl.arange(0, TILE)[None, :]
        padding = padding_row >= tl.gather(end, owner, 0)[:, None]
        tl.store(order + padding_row, tl.full([TILES, TILE], -1, tl.int32), mask=padding & (tile < num_tiles)[:, None])


@triton.jit
def _inside(bound, first, size):
    """A bound of rows as one of `[first, first + size)`."""
    return tl.minimum(tl.maximum(bound - first, 0), size)


@triton.jit(do_not_specialize=["first", "num_tiles"])
def row_layout_kernel(
    starts, ends, first, part_starts, part_ends, order, tile_expert, num_experts, num_tiles,
    TILE: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of the rows from `first` on: the bounds, each tile's expert, and each row by itself or, in the padding, by -1."""
    bins = tl.arange(0, BINS)
    size = num_tiles * TILE
    start = _inside(tl.load(starts + bins, mask=bins <= num_experts, other=0), first, size)
    end = _inside(tl.load(ends + bins, mask=bins < num_experts, other=0), first, size)
    if tl.program_id(0) == 0:
        tl.store(part_starts + bins, start, mask=bins <= num_experts)
        tl.store(part_ends + bins, end, mask=bins < num_experts)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    live = tile < num_tiles
    expert = _owner_among(tl.where(bins < num_experts, start, 2147483647), tile, TILE)
    tl.store(tile_expert + tile, expert, mask=live)
    row = (tile * TILE)[:, None] + tl.arange(0, TILE)[None, :]
    real = row < tl.gather(end, expert, 0)[:, None]
    tl.store(order + row, tl.where(real, row, -1), mask=live[:, None])


row_layout = Launcher(row_layout_kernel)
