"""The expert MLP as `torch.library` custom ops with fakes, so that compile, checkpoint and graph capture see one node.

Shape legend: T tokens, k choices, R = T * k, E experts, d model width, h hidden width, H = 2h when gated, else h.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.kernels import reference
from lightning_swiftmoe.kernels.routing import Routing, route_reference


@torch.library.custom_op("lightning_swiftmoe::expert_mlp_forward", mutates_args=())
def expert_mlp_forward(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`y[T, d]`, and what the backward needs: `pre[R, H]`, `order[R]`, `inverse[T, k]`, `ends[E]` (int32)."""
    num_experts = up_proj.shape[0]
    if x.device.type == "cpu" and topk_idx.numel():
        low, high = topk_idx.aminmax()
        if low < -1 or high >= num_experts:
            raise ValueError(f"topk_idx must lie in [-1, {num_experts}), got {int(low)} to {int(high)}")
    routing = route_reference(topk_idx, num_experts)
    y, pre = reference.expert_mlp_forward(x, topk_weights, up_proj, down_proj, routing, activation)
    return y, pre, routing.order, routing.inverse, routing.ends


@expert_mlp_forward.register_fake
def _(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, top_k = topk_idx.shape
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(num_tokens * top_k, up_proj.shape[1]),
        topk_idx.new_empty(num_tokens * top_k, dtype=torch.int32),
        topk_idx.new_empty(num_tokens, top_k, dtype=torch.int32),
        topk_idx.new_empty(up_proj.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("lightning_swiftmoe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    order: Tensor,
    inverse: Tensor,
    ends: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, topk_weights, up_proj and down_proj."""
    routing = Routing(order, inverse, ends)
    return reference.expert_mlp_backward(grad_y, x, topk_weights, up_proj, down_proj, pre, routing, activation)


@expert_mlp_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    order: Tensor,
    inverse: Tensor,
    ends: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(topk_weights, memory_format=contiguous),
        torch.empty_like(up_proj, memory_format=contiguous),
        torch.empty_like(down_proj, memory_format=contiguous),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, _, topk_weights, up_proj, down_proj, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(x, topk_weights, up_proj, down_proj, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    grad_x, grad_weights, grad_up, grad_down = torch.ops.lightning_swiftmoe.expert_mlp_backward(
        grad_y, *ctx.saved_tensors, ctx.activation, ctx.backend
    )
    return grad_x, None, grad_weights, grad_up, grad_down, None, None


expert_mlp_forward.register_autograd(_backward, setup_context=_setup_context)


def expert_mlp(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str, backend: str
) -> Tensor:
    """`y[T, d]`; see `lightning_swiftmoe.functional.expert_mlp`, which validates."""
    return torch.ops.lightning_swiftmoe.expert_mlp_forward(
        x, topk_idx, topk_weights, up_proj, down_proj, activation, backend
    )[0]
