"""Launchers of the row kernels: gather, gather-sum, and the activations apart from a GEMM.

Shape legend: T tokens, k choices, P padded rows, d width of a row, h hidden width, H = 2h when gated, else h.
"""

import torch
import triton
from torch import Tensor

from lightning_swiftmoe.kernels import activations_triton, rows_triton
from lightning_swiftmoe.kernels.activations import elementwise_code, is_gated
from lightning_swiftmoe.kernels.padded_routing import PaddedRouting


def gather_rows(source: Tensor, routing: PaddedRouting) -> Tensor:
    """`[P, d]`: the token of every row of `source[T, d]`, zeros in the padding, undefined beyond `num_rows`."""
    source = source.contiguous()
    num_rows, width = routing.row_assignment.shape[0], source.shape[1]
    rows = source.new_empty(num_rows, width)
    block = min(1024, triton.next_power_of_2(width))
    per_program = 4
    rows_triton.gather_rows_kernel[(triton.cdiv(num_rows, per_program),)](
        source,
        routing.row_assignment,
        routing.num_rows,
        rows,
        width,
        TOP_K=routing.inverse.shape[1],
        ROWS=per_program,
        BLOCK=block,
        num_warps=4,
    )
    return rows


def combine_rows(rows: Tensor, routing: PaddedRouting, weights: Tensor | None, out: Tensor) -> None:
    """`out[t] = sum_j weights[t, j] * rows[inverse[t, j]]` into `out[T, d]`, whose columns may be a slice."""
    num_tokens, top_k = routing.inverse.shape
    width = rows.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    tokens = max(1, 2048 // block)
    rows_triton.combine_rows_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(width, block))](
        rows,
        routing.inverse,
        weights,
        out,
        num_tokens,
        rows.stride(0),
        out.stride(0),
        width,
        WEIGHTED=weights is not None,
        TOP_K=top_k,
        TOKENS=tokens,
        BLOCK=block,
        num_warps=4,
    )


def act_forward(pre: Tensor, routing: PaddedRouting, activation: str) -> Tensor:
    """`[P, h]` hidden values of `pre[P, H]`."""
    gated = is_gated(activation)
    hidden_width = pre.shape[1] // (2 if gated else 1)
    hidden = pre.new_empty(pre.shape[0], hidden_width)
    block = min(1024, triton.next_power_of_2(hidden_width))
    activations_triton.act_forward_kernel[(pre.shape[0], triton.cdiv(hidden_width, block))](
        pre, hidden, routing.num_rows, hidden_width, ACT=elementwise_code(activation), GATED=gated, BLOCK=block
    )
    return hidden


def act_backward(
    pre: Tensor, grad_hidden: Tensor, weights: Tensor, routing: PaddedRouting, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_pre[P, H]`, `scaled_hidden[P, h]` and `grad_weights[T, k]`; see `activations.activation_backward`."""
    grad_pre = torch.empty_like(pre)
    scaled_hidden = torch.empty_like(grad_hidden)
    # Dropped assignments have no row, so nothing writes theirs: they stay zero.
    grad_weights = torch.zeros_like(weights)
    width = grad_hidden.shape[1]
    activations_triton.act_backward_kernel[(pre.shape[0],)](
        pre,
        grad_hidden,
        weights,
        routing.row_assignment,
        routing.num_rows,
        grad_pre,
        scaled_hidden,
        grad_weights,
        width,
        ACT=elementwise_code(activation),
        GATED=is_gated(activation),
        BLOCK=min(2048, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return grad_pre, scaled_hidden, grad_weights
