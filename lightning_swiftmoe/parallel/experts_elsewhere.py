"""The expert MLP of tokens whose experts sit on other ranks, as one autograd function around a ``RowTrip``.

Shape suffixes: T tokens, D hidden size, K top-k, P padded rows of this rank as a host.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import aligned, choose_path, on_device, runs_without_host
from lightning_swiftmoe.kernels.expert_mlp.rows_mlp import forward_rows, input_gradients, weight_gradients
from lightning_swiftmoe.parallel.cuda_graphs import identity
from lightning_swiftmoe.parallel.row_exchange import OfTokens, RowTrip


class GradientSink(Protocol):
    """Takes the gradients of this rank's residents.

    They do not pass through autograd, whose leaves would copy what stands in memory that is used again.
    """

    @property
    def is_empty(self) -> bool:
        """Whether it has done with all that it took."""
        ...

    @property
    def copies(self) -> bool:
        """Whether it copies what it takes at once."""
        ...

    def memory(self) -> tuple[Tensor | None, Tensor | None]:
        """Where the current stream should write the next gradients, of up and down projection; None: anywhere."""
        ...

    def take(self, grad_up: Tensor | None, grad_down: Tensor | None) -> None:
        """Gradients of one backward. Their memory is used again in the next, unless the sink is not empty then."""
        ...


class ExpertsElsewhere(torch.autograd.Function):
    """``apply(x_TD, weights_TK, up_proj, down_proj, trip, activation, sink) -> y_TD``, in the dtype of ``x_TD``.

    ``up_proj`` and ``down_proj`` are leaves, this rank's residents; their gradients go to ``sink``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        trip: RowTrip,
        activation: str,
        sink: GradientSink,
    ) -> Tensor:
        num_residents, width, hidden = down_proj.shape
        ctx.trip, ctx.activation, ctx.sink = trip, activation, sink
        path = choose_path(x_TD.device, trip.dtype, width, hidden, num_residents, activation, "auto")
        keeps = any(ctx.needs_input_grad)
        up, down = aligned(up_proj), aligned(down_proj)
        workspace = trip.workspace(hidden)
        spill_memory = trip.spill_memory(up.shape[1]) if keeps else None

        def compute(x: OfTokens, weights: OfTokens, y: OfTokens) -> tuple[Tensor, ...]:
            rows_PD, row_weights_P = trip.to_hosts(x, weights)
            if keeps:
                # What arrived may be in a buffer that the next layers use again.
                row_weights_P = row_weights_P.clone()
            out = trip.result_buffer(rows_PD)
            spill = None if spill_memory is None else trip.spill(spill_memory)
            done_PD, pre = forward_rows(rows_PD, up, down, trip.layout, activation, path, out, workspace, spill)
            trip.offer(done_PD)
            trip.to_tokens(done_PD, y, weights)
            return rows_PD, row_weights_P, pre

        with on_device(x_TD):
            fixed = [memory for memory in (up, down, workspace, spill_memory) if memory is not None]
            key = (identity(*fixed), activation, path, keeps) if runs_without_host(path) else None
            tokens_TD = aligned(x_TD)
            y_TD = torch.empty_like(tokens_TD)
            rows_PD, row_weights_P, pre = trip.travel("forward", key, compute, tokens_TD, aligned(weights_TK), y_TD)
        kept = tokens_TD if trip.resends_tokens else rows_PD
        ctx.save_for_backward(kept, row_weights_P, up, down, pre)
        ctx.path, ctx.weights = path, (weights_TK.shape, weights_TK.dtype)
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, row_weights_P, up, down, pre = ctx.saved_tensors
        trip, path, activation, sink = ctx.trip, ctx.path, ctx.activation, ctx.sink
        _, _, wants_up, wants_down, *_ = ctx.needs_input_grad
        # Unless the graph is kept for another backward, nobody needs the pre-activations any more.
        is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
        out_up, out_down = sink.memory()
        workspace = trip.workspace(down.shape[2])
        spill_memory = trip.spill_memory(up.shape[1])

        def compute(
            grad_y: OfTokens, grad_x: OfTokens, grad_weights: OfTokens, tokens: OfTokens | None = None
        ) -> tuple[Tensor | None, ...]:
            grad_PD, again_PD = trip.gradients_to_hosts(grad_y, tokens)
            rows_PD = again_PD if trip.resends_tokens else kept
            out = trip.result_buffer(grad_PD)
            spill = None if spill_memory is None else trip.spill(spill_memory)
            grad_rows, grad_row_weights, hidden = input_gradients(
                grad_PD,
                row_weights_P,
                up,
                down,
                pre,
                trip.layout,
                activation,
                path,
                is_last,
                out=out,
                workspace=workspace,
                rows=rows_PD,
                spill=spill,
            )
            assert grad_rows is not None
            trip.offer(grad_rows, grad_row_weights)
            # Before the results are fetched: other ranks do not wait for it.
            grads = weight_gradients(
                grad_PD, rows_PD, hidden, trip.layout, path, wants_up, wants_down, out_up, out_down
            )
            trip.to_tokens(grad_rows, grad_x)
            trip.scalars_to_tokens(grad_row_weights, grad_weights)
            return trip.with_loans(*grads)

        with on_device(grad_y):
            grads_TD = aligned(grad_y)
            grad_x = torch.empty_like(grads_TD)
            shape, dtype = ctx.weights
            grad_weights = grad_y.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32))
            tensors = [grads_TD, grad_x, grad_weights]
            fixed = [row_weights_P, up, down, pre]
            fixed += [memory for memory in (out_up, out_down, workspace, spill_memory) if memory is not None]
            if not trip.resends_tokens:
                fixed.append(kept)
            elif wants_up or spill_memory is not None:
                tensors.append(kept)
            # Gradients that nobody has memory for, nor copies, would wait where the next graphs have temporaries.
            have_memory = (out_up is not None or not wants_up) and (out_down is not None or not wants_down)
            may_record = runs_without_host(path) and sink.is_empty and (have_memory or sink.copies)
            key = (identity(*fixed), path, is_last, wants_up, wants_down) if may_record else None
            grad_up, grad_down = trip.travel("backward", key, compute, *tensors)
            sink.take(grad_up, grad_down)
        if is_last:
            trip.end()
        return grad_x, grad_weights.to(dtype), None, None, None, None, None
