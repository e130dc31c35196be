"""``ExpertMLPs`` of experts modules of transformers: fused where we know all that stands between the matrices.

Shape legend: T tokens, k choices per token, E experts, d model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_swiftmoe.functional import expert_mlp
from lightning_swiftmoe.hf.activations import fused_activation
from lightning_swiftmoe.hf.checks import Projections, check_dtypes, parameter_names, projections
from lightning_swiftmoe.hf.unfused import unfused_mlp


class _ModuleExperts:
    """What all of them have in common.

    Args:
        module: of a class with transformers' ``@use_experts_implementation``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameter_names = parameter_names(module)
        self.up_name = self.parameter_names[0]

    @property
    def training(self) -> bool:
        """Whether the module trains."""
        return self.module.training


class FusedExperts(_ModuleExperts):
    """Those that nothing but an activation tells from ours.

    Args:
        module: of a class with transformers' ``@use_experts_implementation``.
        activation: our name for what it computes between the matrices.
    """

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation

    def __call__(
        self, x_TD: Tensor, idx_TK: Tensor, weights_TK: Tensor, residents: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``[T, d]``, as ``lightning_swiftmoe.layers.experts.Experts`` computes it."""
        up, down = self.matrices(residents)
        return expert_mlp(x_TD, idx_TK, weights_TK, up, down, self.activation)

    def matrices(self, residents: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Up and down projection, the Parameters or ``residents``."""
        weights = residents if residents is not None else self.module._parameters
        return weights[self.up_name], weights["down_proj"]  # type: ignore[return-value]

    def draw(self, key: str, matrix: Tensor, generator: torch.Generator) -> None:
        """See ``ExpertMLPs``."""
        _draw_matrix(self.module, matrix, generator)


class UnfusedExperts(_ModuleExperts):
    """All others: with biases, another layout, a norm, a gate or an activation of their own.

    What the module computes between and behind the products is the module's own. It gets rows of all ranks' tokens,
    those of one expert after the other, and may use Parameters that all experts share: these are dense.

    Args:
        module: of a class with transformers' ``@use_experts_implementation``.
    """

    activation = None

    def __call__(
        self, x_TD: Tensor, idx_TK: Tensor, weights_TK: Tensor, residents: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``[T, d]`` in fp32 or wider, as ``experts_forward`` computes it.

        Raises:
            ValueError: without autocast, ``x_TD`` is of another dtype than the weights.
        """
        weights = self._weights(residents)
        check_dtypes(self.module, weights, x_TD)
        return unfused_mlp(self.module, weights, x_TD, idx_TK, weights_TK)

    def matrices(self, residents: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Up and down projection, the Parameters or ``residents``."""
        weights = self._weights(residents)
        return weights.up, weights.down

    def draw(self, key: str, matrix: Tensor, generator: torch.Generator) -> None:
        """See ``ExpertMLPs``: biases are zero, as in every model of transformers that has them."""
        if matrix.ndim == 1:
            nn.init.zeros_(matrix)
        else:
            _draw_matrix(self.module, matrix, generator)

    def _weights(self, residents: Mapping[str, Tensor] | None) -> Projections:
        return Projections.of(self.module, self.module._parameters if residents is None else residents)


def experts_of(module: nn.Module) -> FusedExperts | UnfusedExperts:
    """Those of a module with transformers' experts interface.

    Raises:
        ValueError: as ``projections``, or it has Parameters that nobody would use.
    """
    weights = projections(module)
    activation = fused_activation(module) if weights.are_plain else None
    if activation is None:
        return UnfusedExperts(module)
    unused = sorted({name for name, _ in module.named_parameters()} - set(parameter_names(module)))
    if unused:
        raise ValueError(
            f"several ranks cannot share the experts of {type(module).__name__}: got a Parameter {', '.join(unused)}, "
            "which neither its gate nor its activation reads, expected none that would get no gradient; read it in an "
            "_apply_gate of the class, or train it on one rank"
        )
    return FusedExperts(module, activation)


def _draw_matrix(module: nn.Module, matrix: Tensor, generator: torch.Generator) -> None:
    """Normal, as every model of transformers draws its experts."""
    config: Any = module.config
    std = getattr(config.get_text_config(), "initializer_range", 0.02)
    nn.init.normal_(matrix, 0.0, std, generator=generator)
