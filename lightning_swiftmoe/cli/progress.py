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
    """Shows loss, survival, imbalance and speed under short names."""

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
