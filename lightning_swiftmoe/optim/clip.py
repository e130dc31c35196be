"""Gradient norms when every rank holds other shards."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from lightning_swiftmoe.exchange import Exchange


def clip_grad_norm(
    params: Iterable[nn.Parameter], shards: Collection[nn.Parameter], max_norm: float, exchange: Exchange
) -> Tensor:
    """Scale gradients so that their 2-norm over the whole model is at most ``max_norm``; returns the norm before.

    Each expert counts once, whatever its replicas: shard norms are added over ranks, dense ones (equal everywhere)
    taken once. Scaling as in ``torch.nn.utils.clip_grad_norm_``.

    Args:
        params: parameters of the optimizer, dense ones and shards.
        shards: those that are shards.
        max_norm: at least zero.
        exchange: the ranks.
    """
    grads = [(p.grad, p in shards) for p in params if p.grad is not None]
    dense = _squared_norm([g for g, is_shard in grads if not is_shard], exchange.device)
    sharded = _squared_norm([g for g, is_shard in grads if is_shard], exchange.device)
    norm = (dense + exchange.sum_scalar(sharded, "gradient norm")).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device in {grad.device for grad, _ in grads}:
        torch._foreach_mul_([grad for grad, _ in grads if grad.device == device], scale.to(device))
    return norm


def _squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares in fp64: shards of different ranks round alike, however they are cut."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for norm in torch._foreach_norm(grads) if grads else ():
        total += norm.to(device, torch.float64).square()
    return total
