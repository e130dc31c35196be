"""Auxiliary losses of one MoE layer, and how they reach the gradient without the user adding them.

Both are means over the *global* batch. A rank contributes its own tokens times ``N``, so that the mean over ranks
(what DDP takes of gradients) is the loss of one process on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe import functional


def auxiliary_losses(
    prob_sum: Tensor, z_sum: Tensor, counts: Tensor, top_k: int, num_processes: int = 1
) -> tuple[Tensor, Tensor]:
    """This rank's share of the load-balance loss and of the router z-loss.

    The first is ``E * sum_e f_e * P_e``, 1.0 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4): ``f_e`` is
    the fraction of assignments that expert ``e`` drew over all ranks, before drops; ``P_e`` its mean probability.
    The second is the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5).

    Arguments as in ``lightning_swiftmoe.functional.auxiliary_losses``.
    """
    return functional.auxiliary_losses(prob_sum, z_sum, counts, top_k, num_processes)


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
