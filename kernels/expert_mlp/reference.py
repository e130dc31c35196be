"""The expert MLP in plain torch: the twin of the Triton path, its oracle in fp64, and the CPU path.

Shape legend: T tokens, k choices, R = T * k rows in expert order, E experts, d model width, h hidden width,
H = 2h for a gated activation, else h.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.expert_mlp.activations import activation_backward, activation_forward
from lightning_swiftmoe.kernels.expert_mlp.grouped import grouped_matmul, grouped_weight_grad
from lightning_swiftmoe.kernels.token_permute.routing import Routing


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def gather_sum(rows: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
    """`out[t] = sum_j weights[t, j] * rows[inverse[t, j]]` over the kept assignments, summed wide in the order of j.

    Args:
        rows: `[R, d]`; rows of dropped assignments may hold anything.
        routing: the metadata that sorted the rows.
        weights: `[T, k]`, or None for ones.

    Returns:
        `[T, d]` in `rows.dtype`.
    """
    num_tokens, top_k = routing.inverse.shape
    wide = wide_dtype(rows.dtype)
    total = torch.zeros(num_tokens, rows.shape[1], dtype=wide, device=rows.device)
    for choice in range(top_k):
        picked = rows.index_select(0, routing.inverse[:, choice]).to(wide)
        if weights is not None:
            picked = picked * weights[:, choice, None].to(wide)
        # `where`, never a product with zero: a dropped row may be NaN.
        total += torch.where(routing.kept[:, choice, None], picked, 0)
    return total.to(rows.dtype)


def expert_mlp_forward(
    x: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor, routing: Routing, activation: str
) -> tuple[Tensor, Tensor]:
    """Forward of the expert MLP.

    Args:
        x: `[T, d]`.
        weights: `[T, k]` router weights.
        up_proj: `[E, H, d]`, gate rows first when gated.
        down_proj: `[E, d, h]`.
        routing: assignments in expert order.
        activation: one of `activation_names()`.

    Returns:
        `y[T, d]` and the pre-activations `pre[R, H]`.
    """
    rows = x.index_select(0, routing.tokens)
    pre = grouped_matmul(rows, up_proj.mT, routing.ends)
    hidden = activation_forward(pre, activation)
    return gather_sum(grouped_matmul(hidden, down_proj.mT, routing.ends), routing, weights), pre


def expert_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    routing: Routing,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up_proj and down_proj from `grad_y[T, d]` and what the forward saved."""
    tokens, ends = routing.tokens, routing.ends
    grad_rows = grad_y.index_select(0, tokens)
    scale = weights.reshape(-1).index_select(0, routing.order)
    grad_hidden = grouped_matmul(grad_rows, down_proj, ends)
    grad_pre, scaled_hidden, grad_scale = activation_backward(pre, grad_hidden, scale, activation)
    grad_down = grouped_weight_grad(grad_rows, scaled_hidden, ends)
    grad_up = grouped_weight_grad(grad_pre, x.index_select(0, tokens), ends)
    grad_x = gather_sum(grouped_matmul(grad_pre, up_proj, ends), routing)
    picked = grad_scale.index_select(0, routing.inverse.reshape(-1)).view(weights.shape)
    grad_weights = torch.where(routing.kept, picked, 0).to(weights.dtype)
    return grad_x, grad_weights, grad_up, grad_down
