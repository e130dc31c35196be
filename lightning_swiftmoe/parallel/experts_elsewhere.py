"""The expert MLP of tokens whose experts sit on other ranks, as one autograd function around a ``RowTrip``.

Shape suffixes: T tokens, D hidden size, K top-k, P padded rows of this rank as a host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import aligned, choose_path, on_device
from lightning_swiftmoe.kernels.rows_mlp import forward_rows, input_gradients, weight_gradients
from lightning_swiftmoe.parallel.row_exchange import RowTrip


class ExpertsElsewhere(torch.autograd.Function):
    """``apply(x_TD, weights_TK, up_proj, down_proj, trip, activation) -> y_TD``; weights of this rank's residents."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, up_proj: Tensor, down_proj: Tensor, trip: RowTrip, activation: str
    ) -> Tensor:
        num_residents, width, hidden = down_proj.shape
        ctx.trip, ctx.activation = trip, activation
        ctx.path = choose_path(x_TD.device, x_TD.dtype, width, hidden, num_residents, activation, "auto")
        with on_device(x_TD):
            rows_PD, row_weights_P = trip.to_hosts(x_TD, weights_TK)
            assert row_weights_P is not None
            if any(ctx.needs_input_grad):
                # What arrived is in a buffer that the next layers use again.
                rows_PD, row_weights_P = rows_PD.clone(), row_weights_P.clone()
            up, down = aligned(up_proj), aligned(down_proj)
            out = trip.result_buffer(rows_PD)
            done_PD, pre = forward_rows(rows_PD, up, down, trip.layout, activation, ctx.path, out)
            y_TD, _ = trip.to_tokens(done_PD, weights_TK)
        ctx.save_for_backward(rows_PD, row_weights_P, up, down, pre)
        ctx.weights_dtype = weights_TK.dtype
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows_PD, row_weights_P, up, down, pre = ctx.saved_tensors
        trip, path, layout = ctx.trip, ctx.path, ctx.trip.layout
        _, _, wants_up, wants_down, *_ = ctx.needs_input_grad
        # Unless the graph is kept for another backward, nobody needs the pre-activations any more.
        overwrite_pre = not torch._C._autograd._get_current_graph_task_keep_graph()
        with on_device(grad_y):
            grad_PD, _ = trip.to_hosts(grad_y.contiguous())
            grad_rows, grad_row_weights, hidden = input_gradients(
                grad_PD,
                row_weights_P,
                up,
                down,
                pre,
                layout,
                ctx.activation,
                path,
                overwrite_pre,
                out=trip.result_buffer(grad_PD),
            )
            assert grad_rows is not None
            grad_x, grad_weights = trip.to_tokens(grad_rows, None, grad_row_weights)
            assert grad_weights is not None
            # Last: other ranks do not wait for it.
            grad_up, grad_down = weight_gradients(grad_PD, rows_PD, hidden, layout, path, wants_up, wants_down)
        return grad_x, grad_weights.to(ctx.weights_dtype), grad_up, grad_down, None, None
