"""What a strategy needs of an MoE layer, whoever wrote it: ``MoE`` is one, experts of transformers are others."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lightning_swiftmoe.layers.dispatchers import AllGroups, Dispatcher
from lightning_swiftmoe.layers.experts import ExpertMLPs
from lightning_swiftmoe.layers.load import LayerLoad

# What transformers' ``@use_experts_implementation`` writes into its modules: they are known without it.
INTERFACE_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_FLAGS = frozenset(INTERFACE_FLAGS)  # every module of a model is asked on every step


def has_experts_interface(module: nn.Module) -> bool:
    """Whether that decorator has written into this very module."""
    return vars(module).keys() >= _FLAGS


class MoELayer(Protocol):
    """A layer whose experts somebody else may place, and bring the tokens to.

    Attributes:
        experts_path: of the experts' module in the layer; ``""`` where the layer is that module.
        knows_aux_loss: whether loads have its load-balance loss; a model may have its own.
        aux_loss_scale: what the layer multiplies losses by that it adds to the gradient on its own.
    """

    experts_path: str
    knows_aux_loss: bool
    aux_loss_scale: float | Tensor

    @property
    def experts(self) -> ExpertMLPs:
        """The experts, whose Parameters are canonical."""
        ...

    @property
    def num_experts(self) -> int:
        """``E``."""
        ...

    @property
    def hidden_size(self) -> int:
        """Last dim of the tokens that experts take."""
        ...

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        ...

    @property
    def capacity_factor(self) -> float | None:
        """None processes every token."""
        ...

    @property
    def is_attached(self) -> bool:
        """Whether a strategy or a virtual cluster drives the layer."""
        ...

    @property
    def balances_itself(self) -> bool:
        """Whether it wants to hear of the loads of every step, by ``update_bias``."""
        ...

    def attach(self, dispatcher: Dispatcher, all_groups: AllGroups | None = None) -> None:
        """Bring tokens to experts by ``dispatcher``; whoever attaches also takes the loads and ends the steps."""
        ...

    def detach(self) -> None:
        """Compute with the layer's own experts again."""
        ...

    def serve(self, x_0D: Tensor) -> None:
        """Run this rank's experts on the tokens of other ranks, with none of its own."""
        ...

    def pop_load(self) -> LayerLoad | None:
        """Loads of the training forwards since the last call; None where there was no forward."""
        ...

    def update_bias(self, loads: Tensor) -> None:
        """A step is over in which all ranks together routed ``loads [E]``; of layers that ``balances_itself``."""
        ...


def experts_name(name: str, layer: MoELayer) -> str:
    """Name of the experts' module where the layer has that ``name``."""
    return ".".join(part for part in (name, layer.experts_path) if part)
