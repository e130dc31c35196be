"""The expert MLP on Triton kernels over the padded layout: forward and backward, composed from the launchers.

Shape legend: T tokens, k choices, P padded rows, E experts, d model width, h hidden width, H = 2h when gated, else h.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_swiftmoe.kernels import hopper
from lightning_swiftmoe.kernels.padded_routing import PaddedRouting
from lightning_swiftmoe.kernels.rows import act_backward, act_forward, combine_rows, gather_rows


def _combined(rows: Tensor, routing: PaddedRouting, weights: Tensor | None) -> Tensor:
    out = rows.new_empty(routing.inverse.shape[0], rows.shape[1])
    combine_rows(rows, routing, weights, out)
    return out


def forward(
    x: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor, routing: PaddedRouting, activation: str,
    gemm: str = "hopper",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`y[T, d]` and `pre[P, H]`."""
    rows = gather_rows(x, routing)
    if gemm == "hopper":
        pre, hidden = hopper.up_gemm(rows, up_proj, routing, activation)
        del rows
        out = hopper.rows_gemm(hidden, down_proj, routing, transposed=True)
    else:
        pre = F.grouped_mm(rows, up_proj.mT, offs=routing.padded_ends)
        del rows
        hidden = act_forward(pre, routing, activation)
        out = F.grouped_mm(hidden, down_proj.mT, offs=routing.padded_ends)
    return _combined(out, routing, weights), pre


def backward(
    grad_y: Tensor, x: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor, pre: Tensor,
    routing: PaddedRouting, activation: str, gemm: str = "hopper", wgrad: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, up_proj and down_proj."""
    grad_rows = gather_rows(grad_y, routing)
    offs = routing.padded_ends
    if gemm == "hopper":
        grad_hidden = hopper.rows_gemm(grad_rows, down_proj, routing, transposed=False)
    else:
        grad_hidden = F.grouped_mm(grad_rows, down_proj, offs=offs)
    grad_pre, scaled_hidden, grad_weights = act_backward(pre, grad_hidden, weights, routing, activation)
    del grad_hidden
    if wgrad == "hopper":
        grad_down = hopper.weight_gemm(grad_rows, scaled_hidden, routing)
    else:
        grad_down = F.grouped_mm(grad_rows.mT, scaled_hidden, offs=offs)
    del grad_rows, scaled_hidden
    rows = gather_rows(x, routing)
    if wgrad == "hopper":
        grad_up = hopper.weight_gemm(grad_pre, rows, routing)
    else:
        grad_up = F.grouped_mm(grad_pre.mT, rows, offs=offs)
    del rows
    if gemm == "hopper":
        out = hopper.rows_gemm(grad_pre, up_proj, routing, transposed=False)
    else:
        out = F.grouped_mm(grad_pre, up_proj, offs=offs)
    return _combined(out, routing, None), grad_weights, grad_up, grad_down
