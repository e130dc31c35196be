"""The router after its scores: top-k, gate weights, load histogram and the sums that auxiliary losses need.

Shape legend: T tokens, E experts, k choices per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import has_triton, interpreted, needs_dispatcher, on_device

SCORES = ("softmax", "sigmoid")
MOST_EXPERTS = 1024  # of which one program holds the scores of a token
_TILE = 1024  # scores held by one program: more of them spill registers


class RoutedTokens(NamedTuple):
    """Where tokens want to go; everything but the integers is differentiable."""

    topk_idx: Tensor  # [T, k] int64
    topk_weights: Tensor  # [T, k] in the dtype of the logits
    prob_sum: Tensor  # [E]: routing probabilities summed over tokens
    z_sum: Tensor  # scalar: squared log-sum-exp of the logits, summed over tokens
    counts: Tensor  # [E] int64: how often each expert was chosen


def route_tokens_reference(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool
) -> RoutedTokens:
    """In plain torch, with torch's autograd."""
    scores = logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores.detach() + bias
    topk_idx = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, topk_idx)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    prob = scores if score == "softmax" else scores / scores.sum(dim=-1, keepdim=True)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    counts.scatter_add_(0, topk_idx.reshape(-1), torch.ones_like(topk_idx.reshape(-1)))
    return RoutedTokens(topk_idx, weights, prob.sum(dim=0), logits.logsumexp(dim=-1).square().sum(), counts)


def _sizes(num_experts: int) -> tuple[int, int]:
    """Scores of a token, padded, and tokens of one program."""
    bins = 1 << max(num_experts - 1, 1).bit_length()
    return bins, max(1, _TILE // bins)


def _blocks(num_tokens: int, block: int) -> int:
    """Programs; one also for no tokens, so that their sums have the alignment that later kernels are compiled for."""
    return max(1, -(-num_tokens // block))


def launch_route_tokens(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`route_tokens_reference` in one kernel and two small sums, without a host synchronisation."""
    from lightning_swiftmoe.kernels.router.route_tokens_triton import route_tokens

    num_tokens, num_experts = logits.shape
    bins, block = _sizes(num_experts)
    blocks = _blocks(num_tokens, block)
    topk_idx = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = logits.new_empty(num_tokens, top_k)
    sums = logits.new_empty(blocks, num_experts + 1)
    # Of the dtype of their sum: torch would convert them in a kernel of its own.
    counts = torch.empty(blocks, num_experts, dtype=torch.int64, device=logits.device)
    with on_device(logits):
        route_tokens(
            (blocks, 1, 1),
            logits.contiguous(),
            bias,
            topk_idx,
            weights,
            sums,
            counts,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            CHOICES=1 << (top_k - 1).bit_length(),
            BINS=bins,
            BLOCK=block,
            SIGMOID=score == "sigmoid",
            NORMALIZE=normalize,
        )
    total = sums.sum(dim=0)
    return topk_idx, weights, total[:-1], total[-1], counts.sum(dim=0)


@torch.library.custom_op("lightning_swiftmoe::route_tokens", mutates_args=())
def route_tokens_op(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`launch_route_tokens` for whoever must see an op, whose outputs may not share memory."""
    topk_idx, weights, prob_sum, z_sum, counts = launch_route_tokens(logits, bias, top_k, score, normalize)
    return topk_idx, weights, prob_sum.clone(), z_sum.clone(), counts


@route_tokens_op.register_fake
def _(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits.new_empty(num_tokens, top_k),
        logits.new_empty(num_experts),
        logits.new_empty(()),
        logits.new_empty(num_experts, dtype=torch.int64),
    )


def launch_route_tokens_backward(
    logits: Tensor,
    topk_idx: Tensor,
    grad_weights: Tensor,
    grad_prob_sum: Tensor | None,
    grad_z_sum: Tensor | None,
    score: str,
    normalize: bool,
) -> Tensor:
    """The gradient of the logits; scores are computed again, which costs less than reading them."""
    from lightning_swiftmoe.kernels.router.route_tokens_triton import route_tokens_grad

    num_tokens, num_experts = logits.shape
    bins, block = _sizes(num_experts)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with on_device(logits):
        route_tokens_grad(
            (_blocks(num_tokens, block), 1, 1),
            logits.contiguous(),
            topk_idx,
            grad_weights.contiguous(),
            None if grad_prob_sum is None else grad_prob_sum.contiguous(),
            grad_z_sum,
            grad,
            num_tokens,
            num_experts,
            TOP_K=topk_idx.shape[1],
            BINS=bins,
            BLOCK=block,
            SIGMOID=score == "sigmoid",
            NORMALIZE=normalize,
        )
    return grad


route_tokens_backward = torch.library.custom_op("lightning_swiftmoe::route_tokens_backward", mutates_args=())(
    launch_route_tokens_backward
)


@route_tokens_backward.register_fake
def _(
    logits: Tensor,
    topk_idx: Tensor,
    grad_weights: Tensor,
    grad_prob_sum: Tensor | None,
    grad_z_sum: Tensor | None,
    score: str,
    normalize: bool,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, _, _, ctx.score, ctx.normalize = inputs
    ctx.save_for_backward(logits, output[0])
    ctx.mark_non_differentiable(output[0], output[4])


def _backward_by(launch: Callable[..., Tensor], ctx: Any, grads: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, from those of weights and both sums, each None where nobody used the output."""
    logits, topk_idx = ctx.saved_tensors
    grad_weights = logits.new_zeros(topk_idx.shape) if grads[0] is None else grads[0]
    grad = launch(logits, topk_idx, grad_weights, grads[1], grads[2], ctx.score, ctx.normalize)
    return grad, None, None, None, None


def _backward(ctx: Any, _: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    return _backward_by(torch.ops.lightning_swiftmoe.route_tokens_backward, ctx, grads)


route_tokens_op.register_autograd(_backward, setup_context=_setup_context)


class _EagerRouteTokens(torch.autograd.Function):
    """The op without the dispatcher, whose Python wrappers take longer than the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = launch_route_tokens(*inputs)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward_by(launch_route_tokens_backward, ctx, grads)


def route_tokens(logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool) -> RoutedTokens:
    """See `lightning_swiftmoe.functional.route_tokens`, which validates."""
    here = has_triton() and (logits.device.type == "cuda" or interpreted())
    if here and logits.dtype == torch.float32 and logits.shape[1] <= MOST_EXPERTS:
        if needs_dispatcher(logits):
            return RoutedTokens(*torch.ops.lightning_swiftmoe.route_tokens(logits, bias, top_k, score, normalize))
        return RoutedTokens(*_EagerRouteTokens.apply(logits, bias, top_k, score, normalize))
    return route_tokens_reference(logits, bias, top_k, score, normalize)


def launch_auxiliary_losses(prob_sum: Tensor, z_sum: Tensor, counts: Tensor, top_k: int, num_processes: int) -> Tensor:
    """`[E + 3]`: both losses of `auxiliary_losses`, and their derivatives by `z_sum` and by `prob_sum`."""
    from lightning_swiftmoe.kernels.router.route_tokens_triton import auxiliary_losses

    num_ranks, num_experts = counts.shape
    out = prob_sum.new_empty(num_experts + 3)
    with on_device(prob_sum):
        auxiliary_losses(
            (1, 1, 1),
            prob_sum.contiguous(),
            z_sum,
            counts.contiguous(),
            out,
            num_ranks,
            num_experts,
            top_k * num_processes,
            BINS=1 << max(num_experts - 1, 1).bit_length(),
        )
    return out


class _AuxiliaryLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prob_sum: Tensor, z_sum: Tensor, counts: Tensor, top_k: int, num_processes: int
    ) -> tuple[Tensor, Tensor]:
        out = launch_auxiliary_losses(prob_sum, z_sum, counts, top_k, num_processes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out)
        return out[0], out[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_aux: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        grad_prob_sum = None if grad_aux is None else out[3:] * grad_aux
        grad_z_sum = None if grad_z is None else out[2] * grad_z
        return grad_prob_sum, grad_z_sum, None, None, None


def auxiliary_losses_reference(
    prob_sum: Tensor, z_sum: Tensor, counts: Tensor, top_k: int, num_processes: int
) -> tuple[Tensor, Tensor]:
    """In plain torch, with torch's autograd."""
    num_experts = counts.shape[1]
    total = counts.sum().clamp_min(1)
    fraction = counts.sum(dim=0).to(prob_sum) / total  # cast first: integers divide in fp32
    scale = top_k * num_processes
    return num_experts * scale * (fraction * prob_sum).sum() / total, z_sum * scale / total


def auxiliary_losses(
    prob_sum: Tensor, z_sum: Tensor, counts: Tensor, top_k: int, num_processes: int
) -> tuple[Tensor, Tensor]:
    """See `lightning_swiftmoe.functional.auxiliary_losses`."""
    here = has_triton() and (prob_sum.device.type == "cuda" or interpreted())
    if here and prob_sum.dtype == torch.float32 and counts.shape[1] <= MOST_EXPERTS and not needs_dispatcher(prob_sum):
        aux, z = _AuxiliaryLosses.apply(prob_sum, z_sum, counts, top_k, num_processes)
        return aux, z
    return auxiliary_losses_reference(prob_sum, z_sum, counts, top_k, num_processes)
