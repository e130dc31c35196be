"""Found by every Trainer through the entry point ``lightning.pytorch.callbacks_factory``.

A module of its own: a Trainer that knows nothing of MoE layers imports these lines and no more of us.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class AuxLossScale(Callback):
    """In automatic optimization the auxiliary losses of ``n`` accumulated batches count ``1/n`` each, as the loss does.

    Lightning divides the loss by ``accumulate_grad_batches``, also in the last, shorter round of an epoch, but does not
    know of losses that a ``MoE`` layer attaches. Layers that a strategy or a virtual cluster of ours drives are left to
    it. So is a layer whose ``aux_loss_scale`` is no longer what we know: somebody set it by hand.
    """

    def __init__(self) -> None:
        self._known: dict[Any, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; where nobody imported the class there are none."""
        moe = sys.modules.get("lightning_swiftmoe.layers.moe")
        if moe is not None and pl_module.automatic_optimization:
            layers = moe.moe_layers(pl_module).values()
            self._known = {layer: 1.0 for layer in layers if not layer.is_attached}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A schedule may have changed how many batches add up."""
        for layer, known in self._known.items():
            if layer.aux_loss_scale == known:
                layer.aux_loss_scale = self._known[layer] = 1 / trainer.accumulate_grad_batches

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The layers are the user's again."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Also where training broke off."""
        self._give_back()

    def _give_back(self) -> None:
        for layer, known in self._known.items():
            if layer.aux_loss_scale == known:
                layer.aux_loss_scale = 1.0
        self._known = {}


def callbacks() -> list[Callback]:
    """What the entry point calls for every Trainer."""
    return [AuxLossScale()]
