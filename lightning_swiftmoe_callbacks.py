"""Found by every Trainer through the entry point ``lightning.pytorch.callbacks_factory``.

A module of its own: a Trainer that knows nothing of MoE layers imports these lines and no more of us.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class AuxLossScale(Callback):
    """In automatic optimization the auxiliary losses of ``n`` accumulated batches count ``1/n`` each, as the loss does.

    Lightning divides the loss by ``accumulate_grad_batches``, also in the last, shorter round of an epoch, and with
    ``precision="16-mixed"`` multiplies it by a scale, but does not know of losses that a ``MoE`` layer attaches. Layers
    that a strategy or a virtual cluster of ours drives are left to it. So is a layer whose ``aux_loss_scale`` is no
    longer what we know: somebody set it by hand.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; where nobody imported the class there are none."""
        moe = sys.modules.get("lightning_swiftmoe.layers.moe")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if moe is not None and (pl_module.automatic_optimization or scaler is not None):
            layers = moe.moe_layers(pl_module).values()
            self._known = {layer: 1.0 for layer in layers if not layer.is_attached}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A schedule may have changed how many batches add up."""
        divides = pl_module.automatic_optimization
        scale = 1 / trainer.accumulate_grad_batches if divides else 1.0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for layer, known in self._known.items():
            if _same(layer.aux_loss_scale, known):
                layer.aux_loss_scale = self._known[layer] = scale
                if scaler is not None:
                    one = next(layer.parameters()).detach().new_ones(())
                    layer.aux_loss_scale = self._known[layer] = scaler.scale(one) * scale

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The layers are the user's again."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Also where training broke off."""
        self._give_back()

    def _give_back(self) -> None:
        for layer, known in self._known.items():
            if _same(layer.aux_loss_scale, known):
                layer.aux_loss_scale = 1.0
        self._known = {}


def _same(scale: Any, known: Any) -> bool:
    """Tensors by identity: their values are on a device."""
    return scale is known or (isinstance(scale, float) and isinstance(known, float) and scale == known)


def callbacks() -> list[Callback]:
    """What the entry point calls for every Trainer."""
    return [AuxLossScale()]
