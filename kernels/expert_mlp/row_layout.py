"""Where rows stand that arrive in expert order already: each expert padded to whole tiles, nothing to gather.

Shape legend: R residents (experts held here), P allocated rows, a multiple of the tile.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import has_triton, interpreted, on_device

_TILES = 32  # tiles named by one program


@dataclass(frozen=True)
class RowLayout:
    """Rows `[starts[r], ends[r])` belong to resident r; up to `starts[r + 1]` they are zero padding.

    Takes the place of a `PaddedRouting` in the GEMMs. Example, with tiles of 4 rows, R = 3 and P = 16:
    `starts = [0, 4, 4, 8]`, `ends = [1, 4, 6]`, `order = [0, -1, -1, -1, 4, 5, -1, -1, ...]`,
    `tile_expert = [0, 2, ...]`, `num_rows = [8]`. What lies at and beyond row 8 is never read.
    """

    starts: Tensor  # [R + 1] int32, multiples of the tile
    ends: Tensor  # [R] int32
    order: Tensor  # [P] int32: the row's own index, -1 in the padding
    tile_expert: Tensor  # [P / tile] int32
    num_rows: Tensor  # [1] int32: rows in use, padding included
    tile: int
    top_k: ClassVar[int] = 0  # no choices of a token to gather from: rows stand in place

    @property
    def allocated_rows(self) -> int:
        """P."""
        return self.order.shape[0]

    @property
    def padded_ends(self) -> Tensor:
        """`[R]` int32: one past each resident's last padded row, as `grouped_mm` wants it."""
        return self.starts[1:]


def row_layout_reference(starts: Tensor, ends: Tensor, allocated_rows: int, tile: int, first: int = 0) -> RowLayout:
    """`row_layout` in plain torch."""
    starts, ends = ((bound - first).clamp(0, allocated_rows) for bound in (starts, ends))
    rows = torch.arange(allocated_rows, dtype=torch.int32, device=starts.device)
    # Residents without rows share their successor's start: the last one that starts at or before the tile owns it.
    owner = torch.searchsorted(starts[:-1].contiguous(), rows[::tile].contiguous(), right=True) - 1
    real = rows < ends[owner.repeat_interleave(tile, output_size=allocated_rows)]
    order = torch.where(real, rows, -1)
    return RowLayout(starts, ends, order, owner.to(torch.int32), starts[-1:], tile)


def row_layout(starts: Tensor, ends: Tensor, allocated_rows: int, tile: int, first: int = 0) -> RowLayout:
    """The layout of rows whose bounds stand in device memory, without waiting for it, or of some of them.

    Args:
        starts: `[R + 1]` int32, multiples of the tile, from 0 to the rows in use.
        ends: `[R]` int32, one past each resident's last real row.
        allocated_rows: P, a multiple of the tile; rows beyond it are left out.
        tile: rows to which every resident is padded; 128 on a GPU.
        first: rows before it are left out, and the others counted from it; a multiple of the tile.

    Raises:
        ValueError: if P is not a positive multiple of the tile.
    """
    if allocated_rows <= 0 or allocated_rows % tile:
        raise ValueError(f"allocated_rows must be a positive multiple of the tile {tile}, got {allocated_rows}")
    # A meta tensor stands for a GPU's: `warmup.py` asks what would be launched.
    if not has_triton() or (starts.device.type == "cpu" and not interpreted()):
        return row_layout_reference(starts, ends, allocated_rows, tile, first)
    from lightning_swiftmoe.kernels.token_permute import routing_triton

    num_residents, num_tiles = ends.shape[0], allocated_rows // tile
    part_starts, part_ends = torch.empty_like(starts), torch.empty_like(ends)
    order = torch.empty(allocated_rows, dtype=torch.int32, device=starts.device)
    tile_expert = torch.empty(num_tiles, dtype=torch.int32, device=starts.device)
    with on_device(starts):
        routing_triton.row_layout(
            (-(-num_tiles // _TILES), 1, 1),
            starts,
            ends,
            first,
            part_starts,
            part_ends,
            order,
            tile_expert,
            num_residents,
            num_tiles,
            TILE=tile,
            BINS=1 << num_residents.bit_length(),
            TILES=_TILES,
        )
    return RowLayout(part_starts, part_ends, order, tile_expert, part_starts[-1:], tile)
