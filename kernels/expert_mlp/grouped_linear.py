"""A linear layer per expert over rows sorted by expert, for MLPs that are not ours to fuse; differentiable.

Two `torch.library` ops, so that a compiler sees a node and not the loop of a CPU.

Shape legend: R rows in expert order, E experts, K and N columns of input and output, `ends[E]` int32 one past the last
row of each expert. Rows at and beyond `ends[-1]` belong to no expert.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.expert_mlp.grouped import grouped_matmul, grouped_weight_grad

_ONES = 8  # columns of ones: torch's grouped kernels want rows of 16 bytes


@torch.library.custom_op("lightning_swiftmoe::grouped_linear", mutates_args=())
def grouped_linear_op(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, transposed: bool) -> Tensor:
    """See `grouped_linear`."""
    out = grouped_matmul(rows.contiguous(), weight if transposed else weight.mT, ends)
    position = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    if bias is not None:
        # The last expert's for rows of none: they are zeroed below.
        expert = torch.searchsorted(ends, position, right=True).clamp(max=ends.shape[0] - 1)
        out = out + bias.index_select(0, expert)
    return out.masked_fill_((position >= ends[-1]).unsqueeze(1), 0)  # torch leaves those undefined


@grouped_linear_op.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, transposed: bool) -> Tensor:
    dtype = rows.dtype if bias is None else torch.promote_types(rows.dtype, bias.dtype)
    return rows.new_empty(rows.shape[0], weight.shape[2 if transposed else 1], dtype=dtype)


@torch.library.custom_op("lightning_swiftmoe::grouped_outer", mutates_args=())
def grouped_outer_op(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`out[e] = left[rows of e].T @ right[rows of e]`, `[E, M, N]`."""
    return grouped_weight_grad(left.contiguous(), right.contiguous(), ends)


@grouped_outer_op.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, bias, ends, ctx.transposed = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(rows, weight, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ends = ctx.saved_tensors
    narrow = grad.to(rows.dtype)
    grad_rows = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_rows = grouped_linear_op(narrow, weight, None, ends, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        grad_weight = grouped_outer_op(*((rows, narrow) if ctx.transposed else (narrow, rows)), ends)
    if ctx.needs_input_grad[2]:
        # A matrix product, which adds up wide and in one order; scattered additions in bf16 would do neither.
        sums = grouped_outer_op(grad.new_ones(grad.shape[0], _ONES), grad, ends)
        grad_bias = sums[:, 0].to(ctx.bias_dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_rows, grad_weight, grad_bias, None, None


grouped_linear_op.register_autograd(_backward, setup_context=_setup_context)


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, transposed: bool) -> Tensor:
    """`out[r] = rows[r] @ weight[e].T + bias[e]` for the expert e of row r, zeros for rows of no expert.

    Differentiable once in `rows`, `weight` and `bias`. The same inputs give the same bits on every run.

    Args:
        rows: `[R, K]` in expert order. R may be zero.
        weight: `[E, N, K]`, or `[E, K, N]` where `transposed`; dtype of rows. Its gradient is laid out as it is.
        bias: `[E, N]` of any floating dtype, or None.
        ends: `[E]` int32.
        transposed: whether a weight stands as `rows @ weight[e]` wants it.

    Returns:
        `[R, N]` in the dtype of rows, or what it and the bias's promote to.
    """
    out: Tensor = grouped_linear_op(rows, weight, bias, ends, transposed)
    return out
