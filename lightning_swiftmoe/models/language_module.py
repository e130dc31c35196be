"""``LanguageModule``: what LightningModules of language models share, whatever model they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class LanguageModule(pl.LightningModule):
    """Losses of batches, logged; two groups of weights under a warm-up and a cosine.

    A subclass says what the losses are: ``training_loss`` and ``evaluation_loss``.

    Args:
        optimizer: takes parameter groups; default AdamW with a learning rate of 3e-4. One with modes, ``train()`` and
            ``eval()``, is told of them; checkpoints in the middle of training hold the weights of its training mode.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: the cosine ends at this share of the learning rate, at ``trainer.max_steps``.
        seed: draws the first weights; the same on every rank.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        warmup_steps: int = 20,
        min_lr_ratio: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._optimizer: OptimizerFactory = optimizer or (lambda groups: torch.optim.AdamW(groups, lr=3e-4))
        self.warmup_steps, self.min_lr_ratio = warmup_steps, min_lr_ratio
        self.meta_seed = seed

    def training_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """What this rank minimises, and the cross-entropy in it; the mean over ranks is that of all."""
        raise NotImplementedError

    def evaluation_loss(self, batch: Any) -> tuple[Tensor, int]:
        """The mean cross-entropy of a batch, and its weight among batches and ranks."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs the cross-entropy, in nats per token, as ``train/loss``."""
        loss, cross_entropy = self.training_loss(batch)
        self.log("train/loss", cross_entropy, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val/loss``."""
        loss, weight = self.evaluation_loss(batch)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=weight)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``test/loss``."""
        loss, weight = self.evaluation_loss(batch)
        self.log("test/loss", loss, sync_dist=True, batch_size=weight)

    def on_train_start(self) -> None:
        """Schedule-free optimizers have modes, as modules do: they step in this one."""
        self._set_mode_of_optimizers("train")

    def on_validation_start(self) -> None:
        """Validate the average that a schedule-free optimizer keeps."""
        self._set_mode_of_optimizers("eval")

    def on_validation_end(self) -> None:
        """Go on training the weights themselves."""
        self._set_mode_of_optimizers("train")

    def on_train_end(self) -> None:
        """Leave the average."""
        self._set_mode_of_optimizers("eval")

    def _set_mode_of_optimizers(self, mode: str) -> None:
        for optimizer in self.trainer.optimizers:
            set_mode = getattr(optimizer, mode, None)
            if callable(set_mode):
                set_mode()

    def configure_optimizers(self) -> Any:
        """Two groups, with and without weight decay, under a warm-up and a cosine."""
        optimizer = self._optimizer(decay_groups(self))
        steps = self.trainer.estimated_stepping_batches
        total = int(steps) if math.isfinite(steps) else 1_000_000
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, self.warmup_steps, total, self.min_lr_ratio))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay as the optimizer says; vectors (norms, biases) do not."""
    params = [param for param in module.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if param.ndim >= 2]},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Factor on the learning rate: linear up to 1 over ``warmup`` steps, then a cosine to ``floor`` at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
