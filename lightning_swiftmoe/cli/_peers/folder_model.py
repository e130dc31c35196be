"""A model of transformers among the systems of ``swiftmoe bench step model=hf``: all start from the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_swiftmoe.models import FolderModel
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.meta_start import materialize_dense, materialize_experts

BUILT_IN = "grouped_mm"


class FolderLM(nn.Module):
    """The model, without weights, and the loss of next tokens.

    Args:
        config: which model.
        experts: transformers' name of what computes its experts; None: ours.
    """

    def __init__(self, config: FolderModel, experts: str | None = None) -> None:
        super().__init__()
        self.model: Any = config.build(on_meta=True)[0]
        if experts is not None:
            self.model.set_experts_implementation(experts)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss in nats per token of ``[B, T + 1]`` tokens; the model's auxiliary loss is left out."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def loss(self, tokens: Tensor) -> Tensor:
        """The same, under the name that our GPT has for it."""
        loss: Tensor = self(tokens)
        return loss


def fill_in(module: nn.Module, seed: int, device: torch.device) -> None:
    """The weights that our strategy gives ``module``, all of them in this process, on ``device``.

    Args:
        module: holds models without weights, under the names that the strategy knows.
        seed: of the run.
        device: to draw on, as the strategy's ranks do.
    """
    materialize_dense(module, seed)
    materialize_experts(module, seed, Communicator(None, device))
    module.to(device)
