"""The expert weights of one MoE layer.

The Parameters are canonical, ``[E, rows, ...]``, inside a strategy too, where each rank may hold a part of them only
and computes with residents instead: working copies ``[R, rows, ...]`` of some experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_swiftmoe.functional import expert_mlp, is_gated


class ExpertMLPs(Protocol):
    """Two-layer MLPs whose weights are Parameters of one module: two matrices for each expert, perhaps biases.

    Attributes:
        up_name: of the up projection, with or without a gate.
    """

    up_name: str

    @property
    def activation(self) -> str | None:
        """Between ``up_name [E, rows, d]`` and ``down_proj [E, d, h]``, which are all there is; see
        ``lightning_swiftmoe.functional.activation_names``. None: experts of another kind, which our kernels do not
        compute.
        """
        ...

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameters ``[E, rows, ...]``, with a part for each expert. All others of the module are dense."""
        ...

    @property
    def module(self) -> nn.Module:
        """Whose Parameters they are."""
        ...

    @property
    def training(self) -> bool:
        """Whether the module trains."""
        ...

    def __call__(
        self, x_TD: Tensor, idx_TK: Tensor, weights_TK: Tensor, residents: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """As ``Experts.forward``."""
        ...

    def matrices(self, residents: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Up and down projection, the Parameters or ``residents``."""
        ...

    def draw(self, key: str, matrix: Tensor, generator: torch.Generator) -> None:
        """Initial values of one expert, ``[rows, ...]`` of the Parameter ``key``, distributed as the module's own."""
        ...


def expert_parameters(experts: ExpertMLPs) -> dict[str, nn.Parameter]:
    """Those with a part for each expert, by name, in registration order; without any that was taken out."""
    own = experts.module.named_parameters(recurse=False)
    return {name: param for name, param in own if name in experts.parameter_names}


class Experts(nn.Module):
    """Two-layer MLPs, one per expert; gated ones keep gate and up projection in one tensor, gate rows first.

    Parameters: ``gate_up_proj [E, 2h, d]`` or ``up_proj [E, h, d]``, and ``down_proj [E, d, h]``.

    Attributes:
        initial_std: of a normal distribution, by Parameter; None: every expert is drawn as ``nn.Linear`` is.
    """

    initial_std: Mapping[str, float] | None = None

    def __init__(self, hidden_size: int, ffn_size: int, num_experts: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.up_name = "gate_up_proj" if is_gated(activation) else "up_proj"
        rows = 2 * ffn_size if is_gated(activation) else ffn_size
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(num_experts, rows, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all experts."""
        for key, weight in self.named_parameters():
            self.draw(key, weight)

    def draw(self, key: str, matrix: Tensor, generator: torch.Generator | None = None) -> None:
        """See ``ExpertMLPs``; without a generator torch's own."""
        if self.initial_std is not None:
            nn.init.normal_(matrix, 0.0, self.initial_std[key], generator=generator)
            return
        bound = 1 / math.sqrt(matrix.shape[-1])
        nn.init.uniform_(matrix, -bound, bound, generator=generator)

    def forward(
        self, x_TD: Tensor, idx_TK: Tensor, weights_TK: Tensor, residents: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``y[t] = sum_k weights[t, k] * mlp_{idx[t, k]}(x[t])``, ``[T, D]``; ``idx == -1`` contributes nothing.

        Args:
            x_TD: tokens.
            idx_TK: experts; with ``residents``, resident numbers.
            weights_TK: gate weights.
            residents: weights to use in place of the Parameters, under their names.
        """
        up, down = self.matrices(residents)
        return expert_mlp(x_TD, idx_TK, weights_TK, up, down, self.activation)

    @property
    def module(self) -> nn.Module:
        """Itself."""
        return self

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """See ``ExpertMLPs``."""
        return self.up_name, "down_proj"

    def matrices(self, residents: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Up and down projection, the Parameters or ``residents``."""
        if residents is not None:
            return residents[self.up_name], residents["down_proj"]
        return getattr(self, self.up_name), self.down_proj
