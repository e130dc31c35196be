"""The twins of the functions in `peer_shards.py`, in one pass over memory.

All multiprocessors for a short while: GEMMs are persistent and wait for the last one, so that holding a few for longer
costs more. Measured on two H100 (GPT-Small, 16 experts, every expert on both), milliseconds a step with
tiles of 4,096 elements: 528 programs of 4 warps 81.2, 16 of 16 warps 90.8, 32 of 16 warps 104.4.

Shape legend: E experts, P elements of an expert, of which c from `start` on are this rank's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_swiftmoe.kernels.indirect import Indirect
from lightning_swiftmoe.kernels.indirect_triton import ELEMENT, pointer_from, pointer_of
from lightning_swiftmoe.kernels.launch import Launcher
from lightning_swiftmoe.kernels.shards.peer_shards import Residents

_BLOCK = 2048  # elements moved at a time by one program
_WARPS = 4
_PROGRAMS = 528  # four to a multiprocessor of an H100
_INTERPRETER_BLOCK = 16  # several blocks also in small tests


@triton.jit
def _start_of(peers, hosts, numbers, at, P, DTYPE: tl.constexpr):
    """Pointer to the first element of a resident."""
    base = pointer_from(tl.load(peers + tl.load(hosts + at)), DTYPE)
    return base + tl.load(numbers + at).to(tl.int64) * P


@triton.jit
def push_shards_kernel(
    shard, first, hosts, numbers, peers, c, P, start, num_tiles, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """`resident[start + i] = shard[e, i]` for all residents of every expert."""
    tiles_of_expert = tl.cdiv(c, BLOCK)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        cols = (tile % tiles_of_expert) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < c
        value = tl.load(shard + expert.to(tl.int64) * c + cols, mask=mask, other=0.0).to(DTYPE)
        for at in range(tl.load(first + expert), tl.load(first + expert + 1)):
            tl.store(_start_of(peers, hosts, numbers, at, P, DTYPE) + start + cols, value, mask=mask)


@triton.jit(do_not_specialize=["scale"])
def pull_shards_kernel(
    total, first, hosts, numbers, peers, c, P, start, num_tiles, scale,
    INDIRECT: tl.constexpr, ELEMENT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`total[e, i] = scale * sum of gradient[start + i]` over the residents of e, in their order."""
    total = pointer_of(total, INDIRECT, ELEMENT)
    wide = total.dtype.element_ty
    tiles_of_expert = tl.cdiv(c, BLOCK)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        cols = (tile % tiles_of_expert) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < c
        acc = tl.zeros([BLOCK], wide)
        for at in range(tl.load(first + expert), tl.load(first + expert + 1)):
            acc += tl.load(_start_of(peers, hosts, numbers, at, P, DTYPE) + start + cols, mask=mask, other=0.0).to(wide)
        tl.store(total + expert.to(tl.int64) * c + cols, acc * scale, mask=mask)


_push = Launcher(push_shards_kernel)
_pull = Launcher(pull_shards_kernel)


def launch_push(shard: Tensor, residents: Residents, peers: Tensor, size: int, start: int, dtype: torch.dtype) -> None:
    """`peer_shards.push_shards`."""
    block, num_tiles = _tiles(shard)
    _push(
        (min(num_tiles, _PROGRAMS), 1, 1),
        shard,
        residents.first,
        residents.host,
        residents.resident,
        peers,
        shard.shape[1],
        size,
        start,
        num_tiles,
        num_warps=_WARPS,
        DTYPE=ELEMENT[dtype],
        BLOCK=block,
    )


def launch_pull(
    total: Tensor | Indirect,
    residents: Residents,
    peers: Tensor,
    size: int,
    start: int,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """`peer_shards.pull_shards`."""
    block, num_tiles = _tiles(total)
    _pull(
        (min(num_tiles, _PROGRAMS), 1, 1),
        total.cell if isinstance(total, Indirect) else total,
        residents.first,
        residents.host,
        residents.resident,
        peers,
        total.shape[1],
        size,
        start,
        num_tiles,
        scale,
        num_warps=_WARPS,
        INDIRECT=isinstance(total, Indirect),
        ELEMENT=ELEMENT[total.dtype],
        DTYPE=ELEMENT[dtype],
        BLOCK=block,
    )


def _tiles(shard: Tensor | Indirect) -> tuple[int, int]:
    """Elements of a tile, and tiles of a shard `[E, c]`."""
    num_experts, num_elements = shard.shape
    block = _BLOCK if shard.device.type == "cuda" else _INTERPRETER_BLOCK
    return block, num_experts * triton.cdiv(num_elements, block)
