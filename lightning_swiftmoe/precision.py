"""Mixed precision that clips the gradients of fused optimizers too."""

from __future__ import annotations

from lightning.pytorch.plugins.precision import MixedPrecision as LightningsMixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer
from typing_extensions import override

from lightning_swiftmoe.optim import holds_scaled


class MixedPrecision(LightningsMixedPrecision):
    """Lightning's, under whose name checkpoints keep the loss scale.

    Lightning clips no gradients of fused optimizers (2.6.6), because those undo fp16's loss scale in their own step.
    Our strategy undoes it before they are clipped, and bf16 has none.
    """

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """See Lightning's; still refused where gradients are scaled, as in manual optimization."""
        if self.scaler is not None and holds_scaled(self.scaler, optimizer):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
        else:
            Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


def clipping_fused(plugin: Precision) -> Precision:
    """One like ``plugin`` that clips gradients of fused optimizers too; a class of the user's own stays as it is."""
    if type(plugin) is not LightningsMixedPrecision:
        return plugin
    return MixedPrecision(plugin.precision, plugin.device, plugin.scaler)  # type: ignore[arg-type]
