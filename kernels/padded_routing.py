"""Routing metadata of the Triton paths: expert order with every expert padded to whole tiles.

Shape legend: T tokens, k choices, R = T * k assignments, E experts, P padded rows, a multiple of the tile.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lightning_swiftmoe.kernels import routing_triton

TILE = 128  # rows of a tile; also the row tile of every grouped GEMM
_BLOCK = 1024  # assignments sorted by one program
_TILES = 32  # tiles named by one program


@dataclass(frozen=True)
class PaddedRouting:
    """Where assignments stand. Rows `[starts[e], ends[e])` are real; up to `starts[e + 1]` they are zero padding.

    Example, with tiles of 4 rows, k = 1, E = 3 and `topk_idx = [[2], [-1], [0], [2]]`: `starts = [0, 4, 4, 8]`,
    `ends = [1, 4, 6]`, `row_assignment = [2, -1, -1, -1, 0, 3, -1, -1, ...]`, `inverse = [[4], [-1], [0], [5]]`,
    `tile_expert = [0, 2, ...]`; what lies at and beyond row 8 is never read.
    """

    row_assignment: Tensor  # [P] int32: token * k + choice, -1 for padding
    inverse: Tensor  # [T, k] int32: the assignment's row, -1 where dropped
    starts: Tensor  # [E + 1] int32
    ends: Tensor  # [E] int32
    tile_expert: Tensor  # [P / TILE] int32

    @property
    def num_rows(self) -> Tensor:
        """One int32 on the device: rows in use, padding included."""
        return self.starts[-1:]

    @property
    def padded_ends(self) -> Tensor:
        """`[E]` int32: one past each expert's last padded row, as `grouped_mm` wants it."""
        return self.starts[1:]


def padded_rows(num_assignments: int, num_experts: int, tile: int = TILE) -> int:
    """Rows to allocate, known without a host synchronisation: the most that any routing can need.

    With n used experts the padding is at most `n * (tile - 1)`, and n is at most `min(E, R)`.
    """
    most = num_assignments + min(num_experts, num_assignments) * (tile - 1)
    return -(-most // tile) * tile


def route(topk_idx: Tensor, num_experts: int, tile: int = TILE) -> PaddedRouting:
    """Sort assignments by expert, stably, without a host synchronisation.

    Args:
        topk_idx: `[T, k]` integers; anything outside `[0, E)` is dropped. T * k must be at least 1.
        num_experts: E.
        tile: rows to which every expert is padded.
    """
    num_assignments = topk_idx.numel()
    device = topk_idx.device
    rows = padded_rows(num_assignments, num_experts, tile)
    block = min(_BLOCK, triton.next_power_of_2(max(num_assignments, 16)))
    bins = triton.next_power_of_2(num_experts + 1)
    num_blocks, num_tiles = triton.cdiv(num_assignments, block), rows // tile

    row_assignment = torch.full((rows,), -1, dtype=torch.int32, device=device)
    inverse = torch.empty(topk_idx.shape, dtype=torch.int32, device=device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    tile_expert = torch.empty(num_tiles, dtype=torch.int32, device=device)
    histograms = torch.empty(2, num_blocks, bins, dtype=torch.int32, device=device)
    topk_idx = topk_idx.contiguous()

    routing_triton.histogram_kernel[(num_blocks,)](
        topk_idx, histograms[0], num_assignments, num_experts, BLOCK=block, BINS=bins
    )
    routing_triton.prefix_kernel[(1,)](
        histograms[0],
        histograms[1],
        starts,
        ends,
        num_blocks,
        num_experts,
        TILE=tile,
        BINS=bins,
        CHUNK=min(max(8192 // bins, 1), triton.next_power_of_2(num_blocks)),
        num_warps=8,
    )
    grid = (num_blocks + triton.cdiv(num_tiles, _TILES),)
    routing_triton.scatter_kernel[grid](
        topk_idx,
        histograms[1],
        starts,
        row_assignment,
        inverse,
        tile_expert,
        num_assignments,
        num_experts,
        num_blocks,
        num_tiles,
        TILE=tile,
        BLOCK=block,
        BINS=bins,
        TILES=_TILES,
    )
    return PaddedRouting(row_assignment, inverse, starts, ends, tile_expert)
