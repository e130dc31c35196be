"""The progress bar of ``swiftmoe train``: one short line."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

SHORT_NAMES = {
    "train/loss": "loss",
    "val/loss": "val",
    "moe/token_survival": "survival",
    "moe/rank_imbalance": "imbalance",
    "moe/tokens_per_s": "tokens/s",
}


class ShortProgressBar(RichProgressBar):
    """Shows loss, survival, imbalance and speed under short names, and how many batches there will be."""

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Lightning's own takes steps that are left for batches: 60 of 30 where two accumulate, or when resumed."""
        trainer = self.trainer
        if trainer.max_epochs != -1 or trainer.max_steps <= 0:
            return super().total_train_batches
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if seen == trainer.num_training_batches:  # of the epoch before
            seen = 0
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, seen + left)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        shown: dict[str, int | str | float | dict] = {}
        for name, value in super().get_metrics(trainer, pl_module).items():
            if name in SHORT_NAMES:
                number = float(value)  # type: ignore[arg-type]
                shown[SHORT_NAMES[name]] = f"{number:,.0f}" if number >= 100 else f"{number:.3f}"
        return shown

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch}"
