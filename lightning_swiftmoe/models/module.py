"""``GPTModule``: the LightningModule around ``GPT``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.models.gpt import GPT, GPTConfig
from lightning_swiftmoe.models.language_module import LanguageModule, OptimizerFactory


class GPTModule(LanguageModule):
    """Next-token training of a GPT-MoE. Batches are ``[B, T + 1]`` tokens of any integer dtype.

    Args:
        model: sizes, a ``GPTConfig`` or its fields.
        optimizer, warmup_steps, min_lr_ratio, seed: as for ``LanguageModule``.
        compile: run the loss through ``torch.compile``: norms, residual additions and the loss in fewer kernels.
        on_meta: build the model on the meta device, so that no rank ever holds all experts; with
            ``strategy="swiftmoe"``. The same seed then draws other weights.
    """

    config_class = GPTConfig  # of `model` on the command line

    def __init__(
        self,
        model: GPTConfig | dict[str, Any],
        optimizer: OptimizerFactory | None = None,
        warmup_steps: int = 20,
        min_lr_ratio: float = 0.1,
        seed: int = 0,
        compile: bool = False,
        on_meta: bool = False,
    ) -> None:
        super().__init__(optimizer, warmup_steps, min_lr_ratio, seed)
        self.config = model if isinstance(model, GPTConfig) else GPTConfig(**model)
        with torch.random.fork_rng(devices=[]), torch.device("meta") if on_meta else nullcontext():
            torch.manual_seed(seed)
            self.gpt = GPT(self.config)
        self._loss = torch.compile(self.gpt.loss) if compile else self.gpt.loss

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits ``[B, T, V]``."""
        return self.gpt(tokens_BT.long())

    def training_loss(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss in nats per token; auxiliary losses come in the backward."""
        loss = self._loss(batch.long())
        return loss, loss

    def evaluation_loss(self, batch: Tensor) -> tuple[Tensor, int]:
        """Mean loss in nats per token, and the number of sequences."""
        return self.gpt.loss(batch.long()), len(batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The likeliest next token at every position, ``[B, T + 1]``."""
        return self(batch).argmax(dim=-1)
