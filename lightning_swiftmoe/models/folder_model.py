"""``FolderModel``: a model of transformers in a local folder, as the configuration of a ``CausalLMModule``.

transformers is needed when it is asked something, not to write it down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lightning_swiftmoe.arguments import check_choice
from lightning_swiftmoe.layers.model_sizes import ModelDescription


@dataclass(frozen=True)
class FolderModel:
    """Which model, and how to run it.

    Args:
        path: a folder with a ``config.json``, safetensors files and a tokenizer, as on the hub. Nothing is downloaded.
        weights: to start with: ``"saved"``: those of the folder; ``"random"``: drawn as the configuration says;
            ``"auto"``: saved ones where the folder has any.
        attention: transformers' ``attn_implementation``.
        checkpoint_activations: compute activations again in the backward instead of keeping them.
        aux_loss_coef: factor on the model's loss that balances experts; 0: none; None: as the configuration says.

    Raises:
        ValueError: a value that is none of these.
    """

    path: str
    weights: str = "auto"
    attention: str = "sdpa"
    checkpoint_activations: bool = False
    aux_loss_coef: float | None = None

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, ("auto", "saved", "random"))
        factor = self.aux_loss_coef
        if factor is not None and not 0 <= factor < math.inf:
            raise ValueError(f"aux_loss_coef must be None or a number, 0 or more, got {factor!r}")

    def build(self, *, on_meta: bool) -> tuple[Any, float]:
        """The model, as ``lightning_swiftmoe.hf.causal_lm.build_model`` makes it, and the factor on its auxiliary loss.

        Raises:
            ImportError: transformers is not installed.
            ValueError: files are missing, or do not fit the model.
        """
        from lightning_swiftmoe.hf.causal_lm import build_model, switch_auxiliary_loss

        model = build_model(
            self.path,
            saved=self._reads_weights(),
            on_meta=on_meta,
            attention=self.attention,
            checkpoint_activations=self.checkpoint_activations,
        )
        return model, switch_auxiliary_loss(model, self.aux_loss_coef)

    def describe(self) -> ModelDescription:
        """Of the model in the folder, whose files are looked at.

        Raises:
            ImportError: transformers is not installed.
            ValueError: as ``build``, or a model without experts that ranks can share.
        """
        from lightning_swiftmoe.hf.packing import why_no_packing
        from lightning_swiftmoe.hf.sizes import sizes_of

        model, factor = self.build(on_meta=True)
        loss = f"on, times {factor:g} (model.aux_loss_coef=0 turns it off)" if factor else "none"
        start = f"those in {self.path}" if self._reads_weights() else "drawn as config.json says"
        remarks = {"model": type(model).__name__, "first weights": start, "auxiliary loss": loss}
        sizes = replace(sizes_of(model), recompute=self.checkpoint_activations)
        return ModelDescription(sizes, why_no_packing(model), remarks)

    def _reads_weights(self) -> bool:
        from lightning_swiftmoe.hf.causal_lm import has_weights

        return has_weights(self.path) if self.weights == "auto" else self.weights == "saved"
