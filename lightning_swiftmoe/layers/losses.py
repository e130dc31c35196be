"""Auxiliary losses of one MoE layer, and how they reach the gradient without the user adding them.

Both are means over the *global* batch. A rank contributes its own tokens times ``N``, so that the mean over ranks
(what DDP takes of gradients) is the loss of one process on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def load_balance_loss(prob_sum: Tensor, counts: Tensor, top_k: int, num_processes: int = 1) -> Tensor:
    """This rank's share of ``E * sum_e f_e * P_e``; 1.0 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4).

    ``f_e`` is the fraction of assignments that expert ``e`` drew over all ranks, before drops; ``P_e`` its mean
    routing probability.

    Args:
        prob_sum: ``[E]`` probabilities summed over the local tokens.
        counts: ``[N, E]`` assignments by rank.
        top_k: assignments per token.
        num_processes: processes the gradient is averaged over.
    """
    num_experts = counts.shape[1]
    total = counts.sum().clamp_min(1)
    fraction = counts.sum(dim=0).to(prob_sum) / total  # cast first: integers divide in fp32
    return num_experts * num_processes * top_k * (fraction * prob_sum).sum() / total


def router_z_loss(z_sum: Tensor, counts: Tensor, top_k: int, num_processes: int = 1) -> Tensor:
    """This rank's share of the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return z_sum * num_processes * top_k / counts.sum().clamp_min(1)


def attach_loss(y: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """``y`` unchanged; in the backward pass ``loss`` receives the gradient ``scale``, as if it had been added."""
    return _AttachLoss.apply(y, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype, ctx.device = scale, loss.dtype, loss.device
        # A compiled graph makes views of its inputs anew outside of itself, and the loss would go missing.
        return y.clone() if torch.compiler.is_compiling() else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=ctx.device), None
