"""A dispatcher as one node of a compiled graph: forward and backward are ops, and what a forward keeps has a ticket.

Tensors that a compiler made may be in memory that it uses again, so that a forward keeps none of them: a backward is
given its tokens. Plans, pre-activations and gradients of experts stay with the dispatcher, as without a compiler.

Shape suffixes: T tokens, D hidden size, K top-k, N ranks, E experts.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_swiftmoe.layers.router import Routing


class CompiledDispatcher(Protocol):
    """What the ops call."""

    def op_forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        capacity_factor: float | None,
        dtype: torch.dtype,
        keeps: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Results, the counts of all ranks, their loads, and the ticket. Nobody asks for sums of ``routing``."""
        ...

    def op_backward(self, grad_y: Tensor, x_TD: Tensor, ticket: int) -> tuple[Tensor, Tensor]:
        """Gradients of tokens and gate weights."""
        ...


class KeptByTicket:
    """Takes the place of autograd's ``ctx`` where a compiler holds the graph.

    Args:
        needs_input_grad: as autograd's.
    """

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.trip: Any = None
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """See ``torch.autograd.function.FunctionCtx``."""
        self.saved_tensors = tensors


_numbers = itertools.count()
_dispatchers: weakref.WeakValueDictionary[int, CompiledDispatcher] = weakref.WeakValueDictionary()


def register(dispatcher: CompiledDispatcher) -> int:
    """The number by which ops find it as long as it lives."""
    number = next(_numbers)
    _dispatchers[number] = dispatcher
    return number


@torch.library.custom_op("lightning_swiftmoe::dispatch_tokens", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(
    x_TD: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    counts: Tensor,
    anchor: Tensor,
    number: int,
    num_ranks: int,
    capacity_factor: float | None,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing = Routing(topk_idx, topk_weights, counts, counts, counts)
    dispatcher = _dispatchers[number]
    y_TD, all_counts, rank_load, ticket = dispatcher.op_forward(x_TD, routing, capacity_factor, dtype, keeps)
    return y_TD, all_counts.clone(), rank_load.clone(), torch.tensor(ticket)


@_forward.register_fake
def _(
    x_TD: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    counts: Tensor,
    anchor: Tensor,
    number: int,
    num_ranks: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    all_counts = counts.new_empty(num_ranks, counts.shape[0])
    return y_TD, all_counts, counts.new_empty(num_ranks), torch.empty((), dtype=torch.int64)


@torch.library.custom_op(
    "lightning_swiftmoe::dispatch_tokens_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _backward(
    grad_y: Tensor, x_TD: Tensor, topk_weights: Tensor, ticket: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weights = _dispatchers[number].op_backward(grad_y, x_TD, int(ticket))
    return grad_x, grad_weights, torch.zeros(())


@_backward.register_fake
def _(grad_y: Tensor, x_TD: Tensor, topk_weights: Tensor, ticket: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    grad_weights = torch.empty_like(topk_weights, memory_format=contiguous)
    return torch.empty_like(x_TD, memory_format=contiguous), grad_weights, torch.empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, topk_weights, _, _, ctx.number, *_ = inputs
    ctx.save_for_backward(x_TD, topk_weights, output[3])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 10
    grad_x, grad_weights, grad_anchor = torch.ops.lightning_swiftmoe.dispatch_tokens_backward(
        grad_y, *ctx.saved_tensors, ctx.number
    )
    return grad_x, None, grad_weights, None, grad_anchor, None, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def dispatch_compiled(
    x_TD: Tensor,
    routing: Routing,
    anchor: Tensor,
    number: int,
    num_ranks: int,
    capacity_factor: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the dispatcher with this number gives, as a compiler sees it.

    Args:
        x_TD: tokens.
        routing: theirs.
        anchor: a scalar on the host that wants a gradient: experts may be all that does, and they are no inputs of
            the op.
        number: from ``register``.
        num_ranks: ``N``.
        capacity_factor: of the layer.
        dtype: that rows travel in: inside a compiled graph nobody knows of autocast.
    """
    keeps = torch.is_grad_enabled()
    y_TD, counts, rank_load, _ = torch.ops.lightning_swiftmoe.dispatch_tokens(
        x_TD,
        routing.topk_idx,
        routing.topk_weights,
        routing.counts,
        anchor,
        number,
        num_ranks,
        capacity_factor,
        dtype,
        keeps,
    )
    return y_TD, counts, rank_load
