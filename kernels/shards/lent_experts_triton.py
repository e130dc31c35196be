"""The twins of the functions in `lent_experts.py`: programs that end at once where nothing is lent.

Shape legend: N ranks, E experts in a vector of BINS, M = COPIES copies on a rank at most, R residents of a rank, of
which the last M are copies, P elements of an expert, N * M loans in a vector of LANES.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_swiftmoe.kernels.indirect_triton import ELEMENT, pointer_from
from lightning_swiftmoe.kernels.launch import Launcher, cdiv, next_power_of_2
from lightning_swiftmoe.kernels.shards.lent_experts import Loans

_BLOCK = 2048  # elements moved at a time by one program
_PROGRAMS = 264  # two to a multiprocessor of an H100
_INTERPRETER_BLOCK = 16  # several blocks also in small tests


@triton.jit
def _resident(multiplicity, rank, expert, E, BINS: tl.constexpr):
    """Number of an expert among the residents of a rank."""
    other = tl.arange(0, BINS)
    slots = tl.load(multiplicity + rank * E + other, mask=other < expert, other=0)
    return tl.sum((slots > 0).to(tl.int64), axis=0)


@triton.jit(do_not_specialize=["rank", "R"])
def fetch_experts_kernel(
    copies, lenders, multiplicity, weights, peers, rank, E, R, P, num_tiles,
    COPIES: tl.constexpr, BINS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`weights[R - M + number]` becomes the resident of the lender."""
    for number in tl.static_range(COPIES):
        expert = tl.load(copies + rank * COPIES + number)
        if expert >= 0:
            lender = tl.load(lenders + rank * COPIES + number)
            source = pointer_from(tl.load(peers + lender), DTYPE)
            source += _resident(multiplicity, lender, expert, E, BINS) * P
            target = weights + (R - COPIES + number).to(tl.int64) * P
            for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
                at = tile * BLOCK + tl.arange(0, BLOCK)
                tl.store(target + at, tl.load(source + at, mask=at < P), mask=at < P)


@triton.jit(do_not_specialize=["rank", "R"])
def offer_gradients_kernel(copies, grads, offered, rank, R, P, num_tiles, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """`offered[number]` becomes `grads[R - M + number]`, where there is a copy."""
    for number in tl.static_range(COPIES):
        if tl.load(copies + rank * COPIES + number) >= 0:
            source = grads + (R - COPIES + number).to(tl.int64) * P
            for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
                at = tile * BLOCK + tl.arange(0, BLOCK)
                tl.store(offered + number * P + at, tl.load(source + at, mask=at < P), mask=at < P)


@triton.jit
def _first(among, lane, LANES: tl.constexpr):
    """The first lane of some, LANES if there is none."""
    return tl.min(tl.where(among, lane, LANES), axis=0)


@triton.jit(do_not_specialize=["rank"])
def collect_gradients_kernel(
    copies, lenders, multiplicity, grads, peers, rank, N, E, P, num_tiles,
    COPIES: tl.constexpr, LANES: tl.constexpr, BINS: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`grads[resident]` grows by what every borrower offers of that expert. A program has columns of its own."""
    lane = tl.arange(0, LANES)
    chosen = tl.load(copies + lane, mask=lane < N * COPIES, other=-1)
    lender = tl.load(lenders + lane, mask=lane < N * COPIES, other=-1)
    waiting = (lender == rank) & (chosen >= 0)
    loan = _first(waiting, lane, LANES)
    while loan < LANES:
        expert = tl.load(copies + loan)
        of_expert = waiting & (chosen == expert)
        target = grads + _resident(multiplicity, rank, expert, E, BINS) * P
        for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            at = tile * BLOCK + tl.arange(0, BLOCK)
            total = tl.load(target + at, mask=at < P, other=0.0).to(WIDE)
            place = loan
            while place < LANES:
                offered = pointer_from(tl.load(peers + place // COPIES), DTYPE) + (place % COPIES) * P
                total += tl.load(offered + at, mask=at < P, other=0.0).to(WIDE)
                place = _first(of_expert & (lane > place), lane, LANES)
            tl.store(target + at, total.to(DTYPE), mask=at < P)
        waiting = waiting & (chosen != expert)
        loan = _first(waiting, lane, LANES)


_fetch = Launcher(fetch_experts_kernel)
_offer = Launcher(offer_gradients_kernel)
_collect = Launcher(collect_gradients_kernel)


def launch_fetch(loans: Loans, weights: Tensor, peers: Tensor) -> None:
    """`lent_experts.fetch_experts`."""
    num_residents, size = weights.shape
    num_experts = loans.multiplicity.shape[1]
    grid, block, num_tiles = _tiles(weights)
    _fetch(
        grid,
        loans.copies,
        loans.lenders,
        loans.multiplicity,
        weights,
        peers,
        loans.rank,
        num_experts,
        num_residents,
        size,
        num_tiles,
        COPIES=loans.most,
        BINS=next_power_of_2(num_experts),
        DTYPE=ELEMENT[weights.dtype],
        BLOCK=block,
    )


def launch_offer(loans: Loans, grads: Tensor, offered: Tensor) -> None:
    """`lent_experts.offer_gradients`."""
    num_residents, size = grads.shape
    grid, block, num_tiles = _tiles(grads)
    _offer(
        grid,
        loans.copies,
        grads,
        offered,
        loans.rank,
        num_residents,
        size,
        num_tiles,
        COPIES=loans.most,
        BLOCK=block,
    )


def launch_collect(loans: Loans, grads: Tensor, peers: Tensor) -> None:
    """`lent_experts.collect_gradients`."""
    num_ranks, num_experts = loans.multiplicity.shape
    grid, block, num_tiles = _tiles(grads)
    _collect(
        grid,
        loans.copies,
        loans.lenders,
        loans.multiplicity,
        grads,
        peers,
        loans.rank,
        num_ranks,
        num_experts,
        grads.shape[1],
        num_tiles,
        COPIES=loans.most,
        LANES=next_power_of_2(num_ranks * loans.most),
        BINS=next_power_of_2(num_experts),
        DTYPE=ELEMENT[grads.dtype],
        WIDE=tl.float64 if grads.dtype == torch.float64 else tl.float32,
        BLOCK=block,
    )


def _tiles(tensor: Tensor) -> tuple[tuple[int, int, int], int, int]:
    """Grid, elements of a tile, and tiles of an expert `[., P]`."""
    block = _INTERPRETER_BLOCK if tensor.device.type == "cpu" else _BLOCK
    num_tiles = cdiv(tensor.shape[1], block)
    return (min(num_tiles, _PROGRAMS), 1, 1), block, num_tiles
