"""The expert MLP as `torch.library` custom ops with fakes, so that compile, checkpoint and graph capture see one node.

Shape legend: T tokens, k choices, R = T * k, P rows of the chosen path's layout, E experts, d model width, h hidden
width, H = 2h when gated, else h.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_swiftmoe.kernels import dispatch
from lightning_swiftmoe.kernels.expert_mlp import reference
from lightning_swiftmoe.kernels.token_permute.routing import route_reference, unpack_reference


def _check_experts(topk_idx: Tensor, num_experts: int) -> None:
    """Only on CPU: elsewhere it would wait for the device."""
    if topk_idx.device.type == "cpu" and topk_idx.numel():
        low, high = topk_idx.aminmax()
        if low < -1 or high >= num_experts:
            raise ValueError(f"topk_idx must lie in [-1, {num_experts}), got {int(low)} to {int(high)}")


def _forward(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`y[T, d]`, and what the backward needs beside the inputs: `pre[P, H]` and the packed int32 routing."""
    num_experts, width = up_proj.shape[0], x.shape[1]
    path = dispatch.choose_path(x.device, x.dtype, width, down_proj.shape[2], num_experts, activation, backend)
    _check_experts(topk_idx, num_experts)
    if topk_idx.numel() == 0:
        rows, packed = dispatch.layout_sizes(path, 0, num_experts, x.device)
        no_rows = x.new_empty(rows, up_proj.shape[1])
        return x.new_zeros(x.shape), no_rows, topk_idx.new_empty(packed, dtype=torch.int32)
    if path == "torch":
        routing = route_reference(topk_idx, num_experts)
        y, pre = reference.expert_mlp_forward(x, topk_weights, up_proj, down_proj, routing, activation)
        return y, pre, routing.packed
    from lightning_swiftmoe.kernels.expert_mlp import padded_mlp
    from lightning_swiftmoe.kernels.token_permute import padded_routing

    with dispatch.on_device(x):
        padded = padded_routing.route(topk_idx, num_experts, dispatch.tile_rows(x.device))
        up_proj, down_proj = dispatch.aligned(up_proj), dispatch.aligned(down_proj)
        y, pre = padded_mlp.forward(x, topk_weights.contiguous(), up_proj, down_proj, padded, activation, path)
        return y, pre, padded.packed


expert_mlp_forward = torch.library.custom_op("lightning_swiftmoe::expert_mlp_forward", mutates_args=())(_forward)


@expert_mlp_forward.register_fake
def _(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = topk_idx.shape
    num_experts, up_rows, width = up_proj.shape
    path = dispatch.choose_path(x.device, x.dtype, width, down_proj.shape[2], num_experts, activation, backend)
    rows, packed = dispatch.layout_sizes(path, num_tokens * top_k, num_experts, x.device)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(rows, up_rows),
        topk_idx.new_empty(packed, dtype=torch.int32),
    )


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    packed: Tensor,
    activation: str,
    backend: str,
    overwrite_pre: bool = False,
    wanted: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """Gradients of x, topk_weights, up_proj and down_proj, where not wanted perhaps None.

    With `overwrite_pre`, `pre` holds anything afterwards.
    """
    num_experts, width = up_proj.shape[0], x.shape[1]
    path = dispatch.choose_path(x.device, x.dtype, width, down_proj.shape[2], num_experts, activation, backend)
    num_tokens, top_k = topk_weights.shape
    if topk_weights.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in (x, topk_weights, up_proj, down_proj))
    if path == "torch":
        routing = unpack_reference(packed, num_tokens, top_k, num_experts)
        return reference.expert_mlp_backward(grad_y, x, topk_weights, up_proj, down_proj, pre, routing, activation)
    from lightning_swiftmoe.kernels.expert_mlp import padded_mlp
    from lightning_swiftmoe.kernels.token_permute import padded_routing

    with dispatch.on_device(x):
        padded = padded_routing.unpack(packed, num_tokens, top_k, num_experts, dispatch.tile_rows(x.device))
        up_proj, down_proj = dispatch.aligned(up_proj), dispatch.aligned(down_proj)
        weights = topk_weights.contiguous()
        return padded_mlp.backward(
            grad_y, x, weights, up_proj, down_proj, pre, padded, activation, path, overwrite_pre, wanted
        )


@torch.library.custom_op("lightning_swiftmoe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    packed: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_gradients` as an op, which must leave its arguments alone."""
    grads = _gradients(grad_y, x, topk_weights, up_proj, down_proj, pre, packed, activation, backend)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], grads)


@expert_mlp_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    packed: Tensor,
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


class _EagerExpertMLP(torch.autograd.Function):
    """The ops without the dispatcher: at 2 ms a step, its Python wrappers would take longer than the GPU."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 7
        # Unless the graph is kept for another backward, nobody needs the pre-activations any more.
        overwrite_pre = not torch._C._autograd._get_current_graph_task_keep_graph()
        needs = ctx.needs_input_grad
        grad_x, grad_weights, grad_up, grad_down = _gradients(
            grad_y, *ctx.saved_tensors, ctx.activation, ctx.backend, overwrite_pre, (needs[0], *needs[2:5])
        )
        return grad_x, None, grad_weights, grad_up, grad_down, None, None


def expert_mlp(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str, backend: str
) -> Tensor:
    """`y[T, d]`; see `lightning_swiftmoe.functional.expert_mlp`, which validates."""
    args = (x, topk_idx, topk_weights, up_proj, down_proj, activation, backend)
    if dispatch.needs_dispatcher(*args[:5]):
        return torch.ops.lightning_swiftmoe.expert_mlp_forward(*args)[0]
    return _EagerExpertMLP.apply(*args)
