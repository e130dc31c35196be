"""Launchers of the portable GEMMs, with the same signatures as those of `hopper.py`.

Shape legend: P padded rows, E experts, K depth, N columns, d model width, h hidden width, H = 2h when gated, else h.
"""

from torch import Tensor

from lightning_swiftmoe.kernels.expert_mlp import gemm_triton
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout
from lightning_swiftmoe.kernels.launch import Launcher, cdiv, next_power_of_2
from lightning_swiftmoe.kernels.token_permute.padded_routing import PaddedRouting
from lightning_swiftmoe.kernels.token_permute.rows import act_backward, act_forward, expert_rows

__all__ = ["expert_rows", "hidden_grad_gemm", "rows_gemm", "up_gemm", "weight_gemm"]

_rows_gemm = Launcher(gemm_triton.rows_gemm_portable_kernel)
_weight_gemm = Launcher(gemm_triton.weight_gemm_portable_kernel)

_BLOCK_N = 128
_BLOCK_K = 32  # 64 spills 240 to 616 bytes of registers a thread on sm_90


def _clipped(block: int, size: int) -> int:
    """A block no larger than needed, and no smaller than `tl.dot` takes."""
    return min(block, max(16, next_power_of_2(size)))


def rows_gemm(
    rows: Tensor, weight: Tensor, routing: PaddedRouting | RowLayout, transposed: bool, out: Tensor | None = None
) -> Tensor:
    """`out[p] = rows[p] @ weight[e]` for `weight[E, K, N]`, or with `weight[e].T` for `[E, N, K]` when transposed."""
    operand = weight.mT if transposed else weight
    depth, columns = operand.shape[1:]
    out = rows.new_empty(rows.shape[0], columns) if out is None else out
    block_n, block_k = _clipped(_BLOCK_N, columns), _clipped(_BLOCK_K, depth)
    _rows_gemm(
        (rows.shape[0] // routing.tile, cdiv(columns, block_n), 1),
        rows,
        operand,
        out,
        routing.tile_expert,
        routing.num_rows,
        depth,
        columns,
        *operand.stride(),
        num_warps=8,
        TILE=routing.tile,
        BN=block_n,
        BK=block_k,
        PRECISION="ieee",
    )
    return out


def up_gemm(
    rows: Tensor,
    up_proj: Tensor,
    routing: PaddedRouting | RowLayout,
    activation: str,
    hidden: Tensor | None = None,
    pre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`pre[P, H] = rows @ up_proj[e].T` and `hidden[P, h] = act(pre)`; memory for hidden values goes unused."""
    pre = rows_gemm(rows, up_proj, routing, transposed=True, out=pre)
    return pre, act_forward(pre, routing, activation)


def hidden_grad_gemm(
    grad_rows: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    weights: Tensor,
    routing: PaddedRouting | RowLayout,
    activation: str,
    grad_pre: Tensor | None = None,
    scaled_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_pre[P, H]`, `scaled_hidden[P, h]` and `partials[1, P]`; see `hopper.hidden_grad_gemm`.

    Memory for `scaled_hidden` goes unused.
    """
    grad_hidden = rows_gemm(grad_rows, down_proj, routing, transposed=False)
    return act_backward(pre, grad_hidden, weights, routing, activation, grad_pre)


def weight_gemm(
    left: Tensor,
    right: Tensor,
    routing: PaddedRouting | RowLayout,
    in_token_order: str,
    out: Tensor | None = None,
) -> Tensor:
    """`out[e] = left[rows of e].T @ right[rows of e]` as `[E, M, N]`; zeros for an expert without rows.

    `in_token_order` names the operand that came from `expert_rows`; here both stand in expert order.
    """
    num_experts, m, n = routing.ends.shape[0], left.shape[1], right.shape[1]
    out = left.new_empty(num_experts, m, n) if out is None else out
    block_m, block_n = _clipped(_BLOCK_N, m), _clipped(_BLOCK_N, n)
    _weight_gemm(
        (num_experts, cdiv(m, block_m), cdiv(n, block_n)),
        left,
        right,
        out,
        routing.starts,
        routing.ends,
        m,
        n,
        num_warps=8,
        BM=block_m,
        BN=block_n,
        BK=min(_BLOCK_K, routing.tile),
        PRECISION="ieee",
    )
    return out
