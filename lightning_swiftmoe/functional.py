"""The expert MLP and the local halves of the shard exchange, on whichever backend is fastest.

Shape legend: T tokens, k choices per token, E experts, d model width, h hidden width, H = 2h for a gated activation
(gate rows first), else h.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.expert_mlp import ops
from lightning_swiftmoe.kernels.expert_mlp.activations import activation_names, is_gated
from lightning_swiftmoe.kernels.router import route_tokens as router
from lightning_swiftmoe.kernels.router.route_tokens import SCORES, RoutedTokens
from lightning_swiftmoe.kernels.shards import expert_shards
from lightning_swiftmoe.kernels.shards.expert_shards import Blocks, Bounds

__all__ = [
    "SCORES",
    "Backend",
    "Blocks",
    "RoutedTokens",
    "activation_names",
    "auxiliary_losses",
    "expert_mlp",
    "gather_shards",
    "is_gated",
    "pack_shards",
    "place_shards",
    "route_tokens",
    "sum_shards",
]

Backend = Literal["auto", "triton", "torch"]


def expert_mlp(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str = "swiglu",
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of each token's experts: `y[t] = sum_j topk_weights[t, j] * mlp_{topk_idx[t, j]}(x[t])`.

    An expert computes `down_proj[e] @ act(up_proj[e] @ x)`. Differentiable once in `x`, `topk_weights`, `up_proj` and
    `down_proj`. The same inputs give the same bits on every run. Under autocast, `x` and both projections are cast to
    the autocast dtype and the router weights are left alone.

    Args:
        x: `[T, d]`, fp64, fp32, bf16 or fp16. T may be zero.
        topk_idx: `[T, k]` int32 or int64. -1 marks a dropped assignment: it adds nothing to y and its weight gets a
            zero gradient. Experts that no row names get zero gradients.
        topk_weights: `[T, k]`, any floating dtype.
        up_proj: `[E, 2h, d]` for a gated activation, gate rows first; else `[E, h, d]`. Same dtype as x.
        down_proj: `[E, d, h]`. Same dtype as x.
        activation: one of `activation_names()`.
        backend: "triton", "torch", or "auto" for the one measured fastest for this device, dtype and shape.

    Returns:
        `[T, d]` in the dtype of x (of autocast, where that is on), summed in fp32 (fp64 for fp64).

    Raises:
        ValueError: for shapes or dtypes that do not fit, an unknown activation or backend, and, where the check needs
            no host synchronisation (CPU), an expert index outside `[-1, E)`.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up_proj, down_proj = x.to(dtype), up_proj.to(dtype), down_proj.to(dtype)
    _check_expert_mlp(x, topk_idx, topk_weights, up_proj, down_proj, activation, backend)
    return ops.expert_mlp(x, topk_idx, topk_weights, up_proj, down_proj, activation, backend)


def _check_expert_mlp(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    backend: str,
) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; valid names: {', '.join(get_args(Backend))}")
    if x.ndim != 2 or down_proj.ndim != 3 or up_proj.ndim != 3:
        raise ValueError(
            f"want x[T, d], up_proj[E, H, d], down_proj[E, d, h]; got {tuple(x.shape)}, {tuple(up_proj.shape)}, "
            f"{tuple(down_proj.shape)}"
        )
    num_experts, width, hidden = down_proj.shape
    want_up = (num_experts, hidden * (2 if is_gated(activation) else 1), width)
    if tuple(up_proj.shape) != want_up or x.shape[1] != width:
        raise ValueError(
            f"activation {activation!r} with down_proj {tuple(down_proj.shape)} wants up_proj {want_up} and x "
            f"[T, {width}]; got {tuple(up_proj.shape)} and {tuple(x.shape)}"
        )
    if topk_idx.ndim != 2 or topk_idx.shape != topk_weights.shape or topk_idx.shape[0] != x.shape[0]:
        raise ValueError(
            f"want topk_idx and topk_weights [{x.shape[0]}, k]; got {tuple(topk_idx.shape)} and "
            f"{tuple(topk_weights.shape)}"
        )
    if topk_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_idx must be int32 or int64, got {topk_idx.dtype}")
    if not (x.dtype == up_proj.dtype == down_proj.dtype) or not x.is_floating_point():
        raise ValueError(
            f"x, up_proj and down_proj must share one floating dtype, got {x.dtype}, {up_proj.dtype}, "
            f"{down_proj.dtype}; cast them or use autocast"
        )
    if not topk_weights.is_floating_point():
        raise ValueError(f"topk_weights must be floating, got {topk_weights.dtype}")


def route_tokens(
    logits: Tensor, top_k: int, score: str = "softmax", normalize: bool = False, bias: Tensor | None = None
) -> RoutedTokens:
    """Top-k, gate weights, load histogram and the sums of the auxiliary losses, without a host synchronisation.

    Args:
        logits: `[T, E]`, fp32 or fp64.
        top_k: choices per token, 1 to E. Of equal scores any may be chosen, always the same on one device.
        score: "softmax" or "sigmoid" of the logits.
        normalize: whether a token's weights add up to one.
        bias: `[E]`, added to the scores for the choice but not for the weights.

    Returns:
        The fields of `RoutedTokens`; weights and both sums are differentiable once in the logits.

    Raises:
        ValueError: for shapes, dtypes or names that do not fit.
    """
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1] or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"want fp32 or fp64 logits[T, E] and 1 <= top_k <= E; got {logits.dtype} {tuple(logits.shape)} and {top_k}"
        )
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; valid names: {', '.join(SCORES)}")
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"want bias[{logits.shape[1]}], got {tuple(bias.shape)}")
    return router.route_tokens(logits, bias, top_k, score, normalize)


def auxiliary_losses(
    prob_sum: Tensor, z_sum: Tensor, counts: Tensor, top_k: int, num_processes: int = 1
) -> tuple[Tensor, Tensor]:
    """This rank's share of the load-balance loss and of the router z-loss; one kernel on a GPU. Differentiable once.

    The first is `E * sum_e f_e * P_e`, 1.0 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4): `f_e` is the
    fraction of assignments that expert `e` drew over all ranks, before drops; `P_e` its mean probability. The second is
    the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        prob_sum: `[E]` probabilities summed over the local tokens.
        z_sum: scalar, squared log-sum-exp of the logits summed over the local tokens.
        counts: `[N, E]` int64 assignments by rank.
        top_k: assignments per token.
        num_processes: processes the gradient is averaged over.
    """
    return router.auxiliary_losses(prob_sum, z_sum, counts, top_k, num_processes)


def pack_shards(grads: Sequence[Tensor], bounds: Bounds) -> Tensor:
    """Cut residents' gradients into shards in send order.

    Args:
        grads: `[R, P_k]` each, flattened gradients of one parameter by resident.
        bounds: for each parameter `N + 1` numbers: rank j owns elements `bounds[k][j]` to `bounds[k][j + 1]`.

    Returns:
        `[R * sum P_k]`: for each rank, its part of every resident, the parameters side by side.
    """
    _check_bounds(grads, bounds)
    return expert_shards.pack_shards(grads, bounds)


def place_shards(arrived: Tensor, residents: Sequence[Tensor], bounds: Bounds) -> None:
    """Fill residents from weight shards as they arrive: the inverse of `pack_shards`, with the cast.

    Args:
        arrived: `[R * sum P_k]`.
        residents: `[R, P_k]` each, contiguous, overwritten.
        bounds: as for `pack_shards`.
    """
    _check_bounds(residents, bounds)
    expert_shards.place_shards(arrived, residents, bounds)


def gather_shards(shards: Sequence[Tensor], blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Weights to send: the shards of each block's expert, the parameters side by side.

    Args:
        shards: `[E, c_k]` each, this rank's part of one parameter.
        blocks: for each resident of every rank its expert.
        dtype: dtype on the wire.

    Returns:
        `[B, sum c_k]`.
    """
    return expert_shards.gather_shards(shards, blocks, dtype)


def sum_shards(
    arrived: Tensor, sizes: Sequence[int], blocks: Blocks, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Sum received gradients by expert in fp32 (fp64 for fp64), each expert's blocks in the order they stand.

    Args:
        arrived: `[B, sum c_k]`, the blocks of source rank 0 first.
        sizes: `c_k`, this rank's elements of each parameter.
        blocks: the expert of each; one without a block gets zeros.
        scale: multiplies the sums.
        dtype: dtype of the results.

    Returns:
        `[E, c_k]` for each parameter.
    """
    if arrived.ndim != 2 or blocks.experts.shape != (arrived.shape[0],) or sum(sizes) != arrived.shape[1]:
        raise ValueError(
            f"want arrived[B, sum of sizes]; got {tuple(arrived.shape)}, {blocks.experts.numel()} blocks and sizes "
            f"{list(sizes)}"
        )
    return expert_shards.sum_shards(arrived, sizes, blocks, scale, dtype)


def _check_bounds(rows: Sequence[Tensor], bounds: Bounds) -> None:
    elements = [(part.shape[1], bound[-1]) for part, bound in zip(rows, bounds, strict=True)]
    if any(have != want for have, want in elements):
        raise ValueError(f"bounds must end at the elements of an expert, got (elements, end) = {elements}")
