"""Launchers of the row kernels: gather, gather-sum, and the activations apart from a GEMM.

Shape legend: T tokens, k choices, P padded rows, d width of a row, h hidden width, H = 2h when gated, else h.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.expert_mlp import activations_triton
from lightning_swiftmoe.kernels.expert_mlp.activations import is_gated, kernel_code
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout
from lightning_swiftmoe.kernels.launch import Launcher, cdiv, next_power_of_2
from lightning_swiftmoe.kernels.token_permute import rows_triton
from lightning_swiftmoe.kernels.token_permute.padded_routing import PaddedRouting

_CLEARERS = 8  # programs that share the padding of one expert

_spread_rows = Launcher(rows_triton.spread_rows_kernel)
_combine_rows = Launcher(rows_triton.combine_rows_kernel)
_sum_partials = Launcher(rows_triton.sum_partials_kernel)
_router_grad = Launcher(rows_triton.router_grad_kernel)
_act_forward = Launcher(activations_triton.act_forward_kernel)
_act_backward = Launcher(activations_triton.act_backward_kernel)


def spread_rows(source: Tensor, routing: PaddedRouting) -> Tensor:
    """`rows[P, d]` in expert order from `source[T, d]`: zeros in the padding, undefined beyond `num_rows`."""
    source = source.contiguous()
    num_tokens, top_k = routing.inverse.shape
    num_experts, width = routing.ends.shape[0], source.shape[1]
    rows = source.new_empty(routing.allocated_rows, width)
    block = min(2048, next_power_of_2(width))
    tokens = max(1, 2048 // block)
    num_blocks = cdiv(num_tokens, tokens)
    _spread_rows(
        (num_blocks + _CLEARERS * num_experts, 1, 1),
        source,
        routing.inverse,
        routing.starts,
        routing.ends,
        rows,
        num_tokens,
        num_blocks,
        width,
        TOP_K=top_k,
        TOKENS=tokens,
        PARTS=_CLEARERS,
        BLOCK=block,
    )
    return rows


def expert_rows(source: Tensor, routing: PaddedRouting | RowLayout) -> Tensor:
    """Rows `[P, d]` in expert order: spread from `source[T, d]`, or the source if its rows stand in place."""
    return source if isinstance(routing, RowLayout) else spread_rows(source, routing)


def combine_rows(rows: Tensor, routing: PaddedRouting, weights: Tensor | None, out: Tensor) -> None:
    """`out[t] = sum_j weights[t, j] * rows[inverse[t, j]]` for `out[T, d]`, summed in fp32; weights None means ones.

    `out` may be some columns of a wider tensor.
    """
    num_tokens, top_k = routing.inverse.shape
    width = rows.shape[1]
    block = min(1024, next_power_of_2(width))
    tokens = max(1, 2048 // block)
    _combine_rows(
        (cdiv(num_tokens, tokens), cdiv(width, block), 1),
        rows,
        routing.inverse,
        weights,
        out,
        num_tokens,
        width,
        out.stride(0),
        WEIGHTED=weights is not None,
        TOP_K=top_k,
        TOKENS=tokens,
        BLOCK=block,
    )


def act_forward(pre: Tensor, routing: PaddedRouting | RowLayout, activation: str) -> Tensor:
    """`[P, h]` hidden values of `pre[P, H]`."""
    gated = is_gated(activation)
    hidden_width = pre.shape[1] // (2 if gated else 1)
    hidden = pre.new_empty(pre.shape[0], hidden_width)
    block = min(1024, next_power_of_2(hidden_width))
    _act_forward(
        (pre.shape[0], cdiv(hidden_width, block), 1),
        pre,
        hidden,
        routing.num_rows,
        hidden_width,
        ACT=kernel_code(activation, pre.dtype),
        GATED=gated,
        BLOCK=block,
    )
    return hidden


def act_backward(
    pre: Tensor,
    grad_hidden: Tensor,
    weights: Tensor,
    routing: PaddedRouting | RowLayout,
    activation: str,
    grad_pre: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_pre[P, H]`, `scaled_hidden[P, h]` and `grad_scale[1, P]`; see `activations.activation_backward`.

    The scale of a row is the router weight of its assignment in `weights[T, k]` (of rows in place, its own in `[P]`),
    zero in the padding. `scaled_hidden` takes the memory of `grad_hidden`; `grad_pre` may be `pre` and is allocated if
    None.
    """
    grad_pre = torch.empty_like(pre) if grad_pre is None else grad_pre
    scaled_hidden = grad_hidden
    grad_scale = torch.empty(1, pre.shape[0], dtype=torch.float32, device=pre.device)
    width = grad_hidden.shape[1]
    _act_backward(
        (pre.shape[0], 1, 1),
        pre,
        grad_hidden,
        weights,
        routing.order,
        routing.num_rows,
        grad_pre,
        scaled_hidden,
        grad_scale,
        width,
        ACT=kernel_code(activation, pre.dtype),
        GATED=is_gated(activation),
        BLOCK=min(2048, next_power_of_2(width)),
    )
    return grad_pre, scaled_hidden, grad_scale


def router_grad(partials: Tensor, routing: PaddedRouting, weights: Tensor) -> Tensor:
    """`grad_weights[T, k]` in the dtype of weights, from `partials[n, P]` summed over n; zeros where dropped."""
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    num_assignments = routing.inverse.numel()
    _router_grad(
        (cdiv(num_assignments, 256), 1, 1),
        partials,
        routing.inverse,
        grad_weights,
        num_assignments,
        partials.shape[0],
        partials.stride(0),
        BLOCK=256,
    )
    return grad_weights


def sum_partials(partials: Tensor, layout: RowLayout) -> Tensor:
    """`[P]` from `partials[n, P]` summed over n; undefined beyond `num_rows`."""
    num_parts, num_rows = partials.shape
    total = torch.empty(num_rows, dtype=partials.dtype, device=partials.device)
    _sum_partials(
        (cdiv(num_rows, 256), 1, 1),
        partials,
        layout.num_rows,
        total,
        num_parts,
        partials.stride(0),
        BLOCK=256,
    )
    return total
