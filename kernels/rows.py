"""Launchers of the row kernels: gather, gather-sum, and the activations apart from a GEMM.

Shape legend: T tokens, k choices, P padded rows, d width of a row, h hidden width, H = 2h when gated, else h.
"""

import torch
import triton
from torch import Tensor

from lightning_swiftmoe.kernels import activations_triton, rows_triton
from lightning_swiftmoe.kernels.activations import is_gated, kernel_code
from lightning_swiftmoe.kernels.padded_routing import PaddedRouting

_CLEARERS = 8  # programs that share the padding of one expert


def spread_rows(source: Tensor, routing: PaddedRouting, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows in expert order from `source[T, d]`.

    Args:
        source: `[T, d]`.
        routing: where each assignment stands.
        weights: `[T, k]` router weights, to be spread alongside, or None.

    Returns:
        `rows[P, d]`, zeros in the padding and undefined beyond `num_rows`; `row_scale[P]` fp32 likewise, or None.
    """
    source = source.contiguous()
    num_tokens, top_k = routing.inverse.shape
    num_experts, num_rows, width = routing.ends.shape[0], routing.allocated_rows, source.shape[1]
    rows = source.new_empty(num_rows, width)
    row_scale = None if weights is None else torch.empty(num_rows, dtype=torch.float32, device=source.device)
    block = min(2048, triton.next_power_of_2(width))
    tokens = max(1, 2048 // block)
    num_blocks = triton.cdiv(num_tokens, tokens)
    rows_triton.spread_rows_kernel[(num_blocks + _CLEARERS * num_experts,)](
        source,
        routing.inverse,
        weights,
        routing.starts,
        routing.ends,
        rows,
        row_scale,
        num_tokens,
        num_blocks,
        width,
        WEIGHTED=weights is not None,
        TOP_K=top_k,
        TOKENS=tokens,
        PARTS=_CLEARERS,
        BLOCK=block,
        num_warps=4,
    )
    return rows, row_scale


def combine_rows(rows: Tensor, routing: PaddedRouting, weights: Tensor | None) -> Tensor:
    """`out[t] = sum_j weights[t, j] * rows[inverse[t, j]]` as `[T, d]`, summed in fp32; weights None means ones."""
    num_tokens, top_k = routing.inverse.shape
    width = rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    tokens = max(1, 2048 // block)
    rows_triton.combine_rows_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(width, block))](
        rows,
        routing.inverse,
        weights,
        out,
        num_tokens,
        width,
        WEIGHTED=weights is not None,
        TOP_K=top_k,
        TOKENS=tokens,
        BLOCK=block,
        num_warps=4,
    )
    return out


def act_forward(pre: Tensor, routing: PaddedRouting, activation: str) -> Tensor:
    """`[P, h]` hidden values of `pre[P, H]`."""
    gated = is_gated(activation)
    hidden_width = pre.shape[1] // (2 if gated else 1)
    hidden = pre.new_empty(pre.shape[0], hidden_width)
    block = min(1024, triton.next_power_of_2(hidden_width))
    activations_triton.act_forward_kernel[(pre.shape[0], triton.cdiv(hidden_width, block))](
        pre, hidden, routing.num_rows, hidden_width, ACT=kernel_code(activation, pre.dtype), GATED=gated, BLOCK=block
    )
    return hidden


def act_backward(
    pre: Tensor, grad_hidden: Tensor, row_scale: Tensor, routing: PaddedRouting, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_pre[P, H]`, `scaled_hidden[P, h]` and `grad_scale[1, P]`; see `activations.activation_backward`."""
    grad_pre = torch.empty_like(pre)
    scaled_hidden = torch.empty_like(grad_hidden)
    grad_scale = torch.empty(1, pre.shape[0], dtype=torch.float32, device=pre.device)
    width = grad_hidden.shape[1]
    activations_triton.act_backward_kernel[(pre.shape[0],)](
        pre,
        grad_hidden,
        row_scale,
        routing.num_rows,
        grad_pre,
        scaled_hidden,
        grad_scale,
        width,
        ACT=kernel_code(activation, pre.dtype),
        GATED=is_gated(activation),
        BLOCK=min(2048, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return grad_pre, scaled_hidden, grad_scale


def router_grad(partials: Tensor, routing: PaddedRouting, weights: Tensor) -> Tensor:
    """`grad_weights[T, k]` in the dtype of weights, from `partials[n, P]` summed over n; zeros where dropped."""
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    num_assignments = routing.inverse.numel()
    rows_triton.router_grad_kernel[(triton.cdiv(num_assignments, 256),)](
        partials, routing.inverse, grad_weights, num_assignments, partials.shape[0], partials.stride(0), BLOCK=256
    )
    return grad_weights
