"""Launchers of the Hopper GEMMs; `dispatch.hopper_supports` says when they apply.

Shape legend: P padded rows, E experts, K depth, N columns, d model width, h hidden width, H = 2h when gated, else h.
"""

import functools

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import aligned
from lightning_swiftmoe.kernels.expert_mlp import gemm_hopper as kernels
from lightning_swiftmoe.kernels.expert_mlp import library, portable
from lightning_swiftmoe.kernels.expert_mlp.activations import is_gated, kernel_code
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout
from lightning_swiftmoe.kernels.launch import Box, Launcher, box
from lightning_swiftmoe.kernels.token_permute.padded_routing import PaddedRouting
from lightning_swiftmoe.kernels.token_permute.rows import expert_rows as rows_in_order

BM, BN, BK, HALF = kernels.BLOCK_M, kernels.BLOCK_N, kernels.BLOCK_K, kernels.HALF_N
_TILING = {"GROUP_M": 8, "BM": BM, "BN": BN, "BK": BK, "STAGES": 3, "WARPS": 8, "COPIERS": 4}
# A gather inside a weight gradient costs some 15 % of it, rows spread in memory before it cost their bytes: even here.
_SPREAD_COLUMNS = 2560
_ALL_TILES = 2**31 - 1

_rows_gemm = Launcher(kernels.rows_gemm_kernel)
_hidden_grad = Launcher(kernels.hidden_grad_kernel)
_weight_gemm = Launcher(kernels.weight_gemm_kernel)


_tiles_per_program: int | None = None


def set_tiles_per_program(tiles: int | None) -> None:
    """Let each program of a GEMM end after so many tiles; None, the default, for persistent ones.

    A persistent program that finds no free multiprocessor, because a kernel of another stream holds it, runs after all
    others have ended: the GEMM takes twice as long. Short ones (4 to 8 tiles) go wherever there is room, and let a
    stream of higher priority in between. Each tile is computed by one program either way: the bits are the same.

    Raises:
        ValueError: if tiles is less than 1.
    """
    global _tiles_per_program
    if tiles is not None and tiles < 1:
        raise ValueError(f"tiles must be at least 1 or None, got {tiles}")
    _tiles_per_program = tiles


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of the device; a launch that is only recorded, on the meta device, needs none."""
    if device.type == "meta":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _schedule(device: torch.device, most_tiles: int) -> tuple[tuple[int, int, int], int, int]:
    """Grid, stride and span of a GEMM with at most so many tiles; see `gemm_hopper._turns`."""
    programs = _multiprocessors(device)
    if _tiles_per_program is None:
        return (programs, 1, 1), programs, _ALL_TILES
    span = programs * _tiles_per_program
    rounds = max(1, -(-most_tiles // span))
    return (rounds * programs, 1, 1), programs, span


def _row_tiles(routing: PaddedRouting | RowLayout, columns: int, tile_columns: int) -> int:
    """The most tiles that a product of all rows can have."""
    return routing.allocated_rows // BM * -(-columns // tile_columns)


def expert_rows(source: Tensor, routing: PaddedRouting | RowLayout) -> Tensor:
    """The source itself: `up_gemm`, `hidden_grad_gemm` and `weight_gemm` gather its rows on the way."""
    return aligned(source)


def _rows_of(source: Tensor, routing: PaddedRouting | RowLayout) -> Tensor | Box:
    """The left operand of a product: a source to gather from, or the tensor map of rows in place."""
    return source if routing.top_k else box(source, (BM, BK))


def rows_gemm(
    rows: Tensor, weight: Tensor, routing: PaddedRouting | RowLayout, transposed: bool, out: Tensor | None = None
) -> Tensor:
    """`out[p] = rows[p] @ weight[e]` for `weight[E, K, N]`, or with `weight[e].T` for `[E, N, K]` when transposed.

    The weight may be a part of its columns N, cut out with `narrow`.
    """
    num_experts, b_rows, b_columns = weight.shape
    columns = b_rows if transposed else b_columns
    expert_rows = weight.stride(0) // weight.stride(1)
    flat = weight.as_strided(((num_experts - 1) * expert_rows + b_rows, b_columns), weight.stride()[1:])
    out = rows.new_empty(rows.shape[0], columns) if out is None else out
    out_box = box(out, (BM, HALF))
    grid, stride, span = _schedule(rows.device, _row_tiles(routing, columns, BN))
    _rows_gemm(
        grid,
        box(rows, (BM, BK)),
        routing.order,
        box(flat, (BN, BK) if transposed else (BK, BN)),
        out_box,
        out_box,
        routing.tile_expert,
        routing.num_rows,
        rows.shape[1],
        columns,
        0,
        expert_rows,
        stride,
        span,
        num_warps=8,
        TOP_K=0,
        NT=transposed,
        GATED=False,
        ACT=-1,
        **_TILING,
    )
    return out


def up_gemm(
    x: Tensor,
    up_proj: Tensor,
    routing: PaddedRouting | RowLayout,
    activation: str,
    hidden: Tensor | None = None,
    pre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather of `x[T, d]`, `pre[P, H] = rows @ up_proj[e].T` and `hidden[P, h] = act(pre)` in one kernel.

    Rows in place are `x[P, d]`, loaded by TMA. `hidden` and `pre` are allocated if None.
    """
    gated = is_gated(activation)
    pre = x.new_empty(routing.allocated_rows, up_proj.shape[1]) if pre is None else pre
    hidden_width = up_proj.shape[1] // (2 if gated else 1)
    hidden = x.new_empty(routing.allocated_rows, hidden_width) if hidden is None else hidden
    grid, stride, span = _schedule(x.device, _row_tiles(routing, hidden_width, HALF if gated else BN))
    _rows_gemm(
        grid,
        _rows_of(x, routing),
        routing.order,
        box(up_proj.view(-1, up_proj.shape[2]), (HALF if gated else BN, BK)),
        box(pre, (BM, HALF)),
        box(hidden, (BM, HALF)),
        routing.tile_expert,
        routing.num_rows,
        x.shape[1],
        hidden_width,
        hidden_width,
        up_proj.shape[1],
        stride,
        span,
        num_warps=8,
        TOP_K=routing.top_k,
        NT=True,
        GATED=gated,
        ACT=kernel_code(activation, x.dtype),
        **_TILING,
    )
    return pre, hidden


def hidden_grad_gemm(
    grad_y: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    weights: Tensor,
    routing: PaddedRouting | RowLayout,
    activation: str,
    grad_pre: Tensor | None = None,
    scaled_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows of grad_y[T, d] @ down_proj[e]` and the activation backward taken from its accumulators.

    Args:
        grad_y: `[T, d]`, or `[P, d]` rows in place.
        weights: `[T, k]` router weights, or `[P]` of rows in place.
        grad_pre: `[P, H]`, which may be `pre`; allocated if None.
        scaled_hidden: `[P, h]`, allocated if None.

    Returns:
        `grad_pre[P, H]`, `scaled_hidden[P, h]` and `partials[n, P]`, whose sum over n is each row's router gradient.
    """
    hidden_width = down_proj.shape[2]
    block = (BM, BN // 4)
    grad_pre = torch.empty_like(pre) if grad_pre is None else grad_pre
    scaled_hidden = pre.new_empty(pre.shape[0], hidden_width) if scaled_hidden is None else scaled_hidden
    partials = torch.empty(-(-hidden_width // BN), pre.shape[0], dtype=torch.float32, device=pre.device)
    grid, stride, span = _schedule(grad_y.device, _row_tiles(routing, hidden_width, BN))
    _hidden_grad(
        grid,
        _rows_of(grad_y, routing),
        routing.order,
        box(down_proj.view(-1, hidden_width), (BK, BN)),
        box(pre, block),
        box(grad_pre, block),
        box(scaled_hidden, block),
        weights,
        partials,
        routing.tile_expert,
        routing.num_rows,
        grad_y.shape[1],
        hidden_width,
        hidden_width,
        down_proj.shape[1],
        pre.shape[0],
        stride,
        span,
        num_warps=8,
        TOP_K=routing.top_k,
        GATED=is_gated(activation),
        ACT=kernel_code(activation, pre.dtype),
        **_TILING,
    )
    return grad_pre, scaled_hidden, partials


def weight_gemm(
    left: Tensor,
    right: Tensor,
    routing: PaddedRouting | RowLayout,
    in_token_order: str,
    out: Tensor | None = None,
) -> Tensor:
    """`out[e] = left[rows of e].T @ right[rows of e]` as `[E, M, N]`; zeros for an expert without rows.

    `in_token_order`, "left" or "right", names the operand `[T, .]`, the other one is `[P, .]`. It is gathered by the
    GEMM or, where that is faster, spread in memory first; rows in place are neither. A tile of 128 rows of the result
    must not reach into the next expert's: other M go to torch, or for fp16, where torch waits for the host, to the
    portable product.
    """
    gathered_right = in_token_order == "right"
    source, other = (right, left) if gathered_right else (left, right)
    whole_tiles = left.shape[1] % BM == 0
    gather = whole_tiles and other.shape[1] < _SPREAD_COLUMNS and routing.top_k > 0
    if not gather:
        rows = rows_in_order(source, routing)
        left, right = (left, rows) if gathered_right else (rows, right)
    if not whole_tiles:
        gemm = library if left.dtype == torch.bfloat16 else portable
        return gemm.weight_gemm(left, right, routing, in_token_order, out)
    num_experts = routing.ends.shape[0]
    out = left.new_empty(num_experts, left.shape[1], right.shape[1]) if out is None else out
    # Only the operand with the narrower tile can be gathered fast enough: the product is transposed on its way out.
    transposed = gather and gathered_right
    a, b = (right, left) if transposed else (left, right)
    most_tiles = num_experts * -(-a.shape[1] // BM) * -(-b.shape[1] // BN)
    grid, stride, span = _schedule(left.device, most_tiles)
    _weight_gemm(
        grid,
        a if gather else box(a, (BK, BM)),
        routing.order,
        box(b, (BK, BN)),
        box(out.view(-1, right.shape[1]), (BM, HALF)),
        routing.starts,
        routing.ends,
        num_experts,
        a.shape[1],
        b.shape[1],
        stride,
        span,
        num_warps=8,
        TOP_K=routing.top_k if gather else 0,
        TRANSPOSED=transposed,
        **_TILING,
    )
    return out
