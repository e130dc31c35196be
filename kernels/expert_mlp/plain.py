"""The GEMMs over rows in place in plain torch, with the signatures of `hopper.py`: any dtype, any device.

Shape legend: P rows of a `RowLayout`, R residents, d model width, h hidden width, H = 2h when gated, else h.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.expert_mlp.activations import activation_backward, activation_forward
from lightning_swiftmoe.kernels.expert_mlp.grouped import grouped_matmul, grouped_weight_grad
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout


def expert_rows(rows: Tensor, layout: RowLayout) -> Tensor:
    """The rows themselves: they stand in expert order."""
    return rows


def rows_gemm(rows: Tensor, weight: Tensor, layout: RowLayout, transposed: bool, out: Tensor | None = None) -> Tensor:
    """`out[p] = rows[p] @ weight[r]` for `weight[R, K, N]`, or with `weight[r].T` for `[R, N, K]` when transposed."""
    return grouped_matmul(rows, weight.mT if transposed else weight, layout.padded_ends, out)


def up_gemm(
    rows: Tensor,
    up_proj: Tensor,
    layout: RowLayout,
    activation: str,
    hidden: Tensor | None = None,
    pre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`pre[P, H] = rows @ up_proj[r].T` and `hidden[P, h] = act(pre)`; memory for hidden values goes unused."""
    pre = rows_gemm(rows, up_proj, layout, transposed=True, out=pre)
    return pre, activation_forward(pre, activation)


def hidden_grad_gemm(
    grad_rows: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    weights: Tensor,
    layout: RowLayout,
    activation: str,
    grad_pre: Tensor | None = None,
    scaled_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_pre[P, H]`, `scaled_hidden[P, h]` and `partials[1, P]`; see `hopper.hidden_grad_gemm`.

    Memory for results goes unused.
    """
    grad_hidden = rows_gemm(grad_rows, down_proj, layout, transposed=False)
    scale = torch.where(layout.order >= 0, weights, 0)
    grad_pre, scaled, grad_scale = activation_backward(pre, grad_hidden, scale, activation)
    return grad_pre, scaled, grad_scale.unsqueeze(0)


def weight_gemm(
    left: Tensor, right: Tensor, layout: RowLayout, in_token_order: str, out: Tensor | None = None
) -> Tensor:
    """`out[r] = left[rows of r].T @ right[rows of r]` as `[R, M, N]`; zeros for a resident without rows."""
    return grouped_weight_grad(left, right, layout.padded_ends, out)
