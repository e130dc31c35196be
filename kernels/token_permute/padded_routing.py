"""Routing metadata of the Triton paths: expert order with every expert padded to whole tiles.

Shape legend: T tokens, k choices, R = T * k assignments, E experts, P padded rows, a multiple of the tile.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.launch import Launcher, cdiv, next_power_of_2
from lightning_swiftmoe.kernels.token_permute import routing_triton

TILE = 128  # rows of a tile; also the row tile of every grouped GEMM
# Sizes of the programs depend on the number of experts alone: following the tokens, each class would be compiled anew.
_BLOCK = 1024  # assignments sorted by one program
_HISTOGRAMS = 8192  # bins that the prefix holds at a time
_TILES = 32  # tiles named by one program

_histogram = Launcher(routing_triton.histogram_kernel)
_prefix = Launcher(routing_triton.prefix_kernel)
_scatter = Launcher(routing_triton.scatter_kernel)
_route_block = Launcher(routing_triton.route_block_kernel)


@dataclass(frozen=True)
class PaddedRouting:
    """Where assignments stand. Rows `[starts[e], ends[e])` are real; up to `starts[e + 1]` they are zero padding.

    Example, with tiles of 4 rows, k = 1, E = 3 and `topk_idx = [[2], [-1], [0], [2]]`: `starts = [0, 4, 4, 8]`,
    `ends = [1, 4, 6]`, `inverse = [[4], [-1], [0], [5]]`, `order = [2, -1, -1, -1, 0, 3, -1, -1, ...]`,
    `tile_expert = [0, 2, ...]`. What lies at and beyond row 8 is never read.
    """

    packed: Tensor  # one int32 buffer that holds all of the below, so that an op can return it
    inverse: Tensor  # [T, k]: the assignment's row, -1 where dropped
    starts: Tensor  # [E + 1]
    ends: Tensor  # [E]
    order: Tensor  # [P]: the row's assignment (token * k + choice), -1 in the padding
    tile_expert: Tensor  # [P / tile]
    num_rows: Tensor  # [1]: rows in use, padding included
    allocated_rows: int  # P
    tile: int

    @property
    def top_k(self) -> int:
        """k: a row's token is its assignment divided by it."""
        return self.inverse.shape[1]

    @property
    def padded_ends(self) -> Tensor:
        """`[E]` int32: one past each expert's last padded row, as `grouped_mm` wants it."""
        return self.starts[1:]


def padded_rows(num_assignments: int, num_experts: int, tile: int = TILE) -> int:
    """Rows to allocate, known without a host synchronisation: the most that any routing can need.

    With n used experts the padding is at most `n * (tile - 1)`, and n is at most `min(E, R)`.
    """
    most = num_assignments + min(num_experts, num_assignments) * (tile - 1)
    return (most + tile - 1) // tile * tile


@functools.cache
def _pieces(num_assignments: int, num_experts: int, tile: int) -> list[int]:
    """Lengths of the packed parts, each followed by a filler, so that every part starts on a multiple of 4 elements:
    Triton specialises on 16-byte alignment."""
    rows = padded_rows(num_assignments, num_experts, tile)
    parts = (num_assignments, num_experts + 1, num_experts, rows, rows // tile)
    return [piece for n in parts for piece in (n, -n % 4)]


def packed_size(num_assignments: int, num_experts: int, tile: int = TILE) -> int:
    """Elements of the packed buffer."""
    return sum(_pieces(num_assignments, num_experts, tile))


def unpack(packed: Tensor, num_tokens: int, top_k: int, num_experts: int, tile: int = TILE) -> PaddedRouting:
    """The routing whose packed buffer this is."""
    pieces = _pieces(num_tokens * top_k, num_experts, tile)
    inverse, starts, ends, order, tile_expert = packed.split_with_sizes(pieces)[::2]
    inverse = inverse.view(num_tokens, top_k)
    return PaddedRouting(packed, inverse, starts, ends, order, tile_expert, starts[-1:], order.shape[0], tile)


def _chunk(bins: int) -> int:
    """Histograms that the prefix takes at a time."""
    return min(max(_HISTOGRAMS // bins, 1), 256)


def route(topk_idx: Tensor, num_experts: int, tile: int = TILE) -> PaddedRouting:
    """Sort assignments by expert, stably, without a host synchronisation.

    Args:
        topk_idx: `[T, k]` integers; anything outside `[0, E)` is dropped. T * k must be at least 1.
        num_experts: E.
        tile: rows to which every expert is padded.
    """
    num_tokens, top_k = topk_idx.shape
    num_assignments, device = num_tokens * top_k, topk_idx.device
    bins = max(4, next_power_of_2(num_experts + 1))  # 4 of them keep both halves below on 16 bytes
    num_blocks = cdiv(num_assignments, _BLOCK)
    packed = torch.empty(packed_size(num_assignments, num_experts, tile), dtype=torch.int32, device=device)
    routing = unpack(packed, num_tokens, top_k, num_experts, tile)
    num_tiles = routing.allocated_rows // tile
    topk_idx = topk_idx.contiguous()
    if num_blocks == 1:
        _route_block(
            (1, 1, 1),
            topk_idx,
            routing.starts,
            routing.ends,
            routing.inverse,
            routing.order,
            routing.tile_expert,
            num_assignments,
            num_experts,
            num_tiles,
            num_warps=8,
            TILE=tile,
            BLOCK=_BLOCK,
            BINS=bins,
            TILES=_TILES,
        )
        return routing

    histograms, offsets = torch.empty(2, num_blocks, bins, dtype=torch.int32, device=device).unbind()
    _histogram((num_blocks, 1, 1), topk_idx, histograms, num_assignments, num_experts, BLOCK=_BLOCK, BINS=bins)
    _prefix(
        (1, 1, 1),
        histograms,
        offsets,
        routing.starts,
        routing.ends,
        num_blocks,
        num_experts,
        num_warps=8,
        TILE=tile,
        BINS=bins,
        CHUNK=_chunk(bins),
    )
    _scatter(
        (num_blocks + cdiv(num_tiles, _TILES), 1, 1),
        topk_idx,
        offsets,
        routing.starts,
        routing.ends,
        routing.inverse,
        routing.order,
        routing.tile_expert,
        num_assignments,
        num_experts,
        num_blocks,
        num_tiles,
        TILE=tile,
        BLOCK=_BLOCK,
        BINS=bins,
        TILES=_TILES,
    )
    return routing
