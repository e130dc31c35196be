"""How the auxiliary losses of one MoE layer reach the gradient without the user adding them.

Both are means over the *global* batch. A rank contributes its own tokens times ``N``, so that the mean over ranks
(what DDP takes of gradients) is the loss of one process on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attach_loss(y: Tensor, loss: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """``y`` unchanged; in the backward pass ``loss`` receives the gradient ``scale``, as if it had been added.

    A ``scale`` on the device, ``[]``, is fp16's loss scale, which the host does not wait for.
    """
    return _AttachLoss.apply(y, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale, ctx.dtype, ctx.device = scale, loss.dtype, loss.device
        # A compiled graph makes views of its inputs anew outside of itself, and the loss would go missing.
        return y.clone() if torch.compiler.is_compiling() else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        if isinstance(ctx.scale, Tensor):
            return grad, ctx.scale.to(ctx.device, ctx.dtype), None
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=ctx.device), None
