"""An experts module of a transformers model as a ``MoELayer``: a strategy may place its experts.

The router, shared experts, auxiliary losses and everything else stay the model's.

Shape legend: T tokens, k choices per token, E experts, d model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_swiftmoe.hf._transformers import PreTrainedModel
from lightning_swiftmoe.hf.checks import NAME, check_choices, check_indices, projections
from lightning_swiftmoe.hf.experts import FusedExperts, UnfusedExperts, experts_of
from lightning_swiftmoe.layers.dispatchers import AllGroups, Dispatcher, LocalDispatcher
from lightning_swiftmoe.layers.layer import has_experts_interface
from lightning_swiftmoe.layers.load import LayerLoad, count_by_expert, counts_as_training
from lightning_swiftmoe.layers.router import Routing, no_tokens

# A layer lives as long as whoever drives it keeps it.
_ATTACHED: WeakValueDictionary[nn.Module, ExpertsLayer] = WeakValueDictionary()
# What models ran with before: as their own getter said, for their own setter.
_BEFORE: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


class ExpertsLayer:
    """The ``MoELayer`` of an experts module. Its tokens come from ``experts_forward`` while it is attached.

    Args:
        module: of a class with transformers' ``@use_experts_implementation``.
        model: it is in, which is told to take ``experts_implementation="swiftmoe"`` as long as it is attached.

    Attributes:
        top_k: choices of a token; of the last forward, 1 before there was one.
        aux_loss_scale: nobody's business here: a model adds its losses to its loss.

    Raises:
        ValueError: as ``experts_of``.
    """

    experts_path = ""
    knows_aux_loss = False
    capacity_factor: float | None = None
    balances_itself = False

    def __init__(self, module: nn.Module, model: PreTrainedModel) -> None:
        self.experts: FusedExperts | UnfusedExperts = experts_of(module)
        self.model = model
        weights = projections(module)
        self.num_experts, self.hidden_size = weights.num_experts, weights.width
        self.top_k = 1
        self.aux_loss_scale: float | Tensor = 1.0
        self._dispatcher: Dispatcher = LocalDispatcher(self.num_experts)
        self._load: LayerLoad | None = None

    def __call__(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What ``experts_forward`` returns, from experts wherever they are. Collective on several ranks.

        Args:
            x_TD: ``[T, d]``; T may be zero, and differ between ranks.
            top_k_index: ``[T, k]`` int32 or int64; -1 and E stand for no expert.
            top_k_weights: ``[T, k]``, any floating dtype.

        Raises:
            ValueError: shapes or indices that do not fit.
        """
        experts = self.experts.module
        check_choices(experts, self.hidden_size, x_TD, top_k_index, top_k_weights)
        check_indices(experts, self.num_experts, top_k_index)
        self.top_k = top_k_index.shape[1]
        routing = self._routing(x_TD, top_k_index, top_k_weights)
        y_TD, counts, rank_load = self._dispatcher(x_TD, routing, self.experts, None)
        if counts_as_training(experts.training):
            self._add_load(counts, rank_load)
        return y_TD.to(x_TD.dtype)

    def serve(self, x_0D: Tensor) -> None:
        """Run this rank's experts on the tokens of other ranks, with none of its own.

        Args:
            x_0D: ``[0, d]``, of the dtype and on the device of theirs.
        """
        self._dispatcher(x_0D, no_tokens(self.num_experts, self.top_k, x_0D), self.experts, None)

    def attach(self, dispatcher: Dispatcher, all_groups: AllGroups | None = None) -> None:
        """Bring tokens to experts by ``dispatcher``; whoever attaches also takes the loads and ends the steps.

        Nobody asks ``all_groups``: auxiliary losses and biases are the model's.

        Raises:
            ValueError: the model cannot be told to.
        """
        self._dispatcher = dispatcher
        module: Any = self.experts.module
        model = self.model
        if model not in _BEFORE:
            before = model.get_experts_implementation()
            model.set_experts_implementation(NAME)
            _BEFORE[model] = before
        _ATTACHED[module] = self
        reached = module.config._experts_implementation  # where the decorator looks
        if reached != NAME:
            self.detach()
            raise ValueError(
                f"{type(module).__name__} still runs with {reached!r} after set_experts_implementation({NAME!r}) of "
                f"{type(model).__name__}, expected {NAME!r}: give it the configuration object of its model"
            )

    def detach(self) -> None:
        """Compute with the module's own experts again, and as the model did before."""
        _ATTACHED.pop(self.experts.module, None)
        self._dispatcher = LocalDispatcher(self.num_experts)
        before = _BEFORE.pop(self.model, None)
        if before is not None:
            self.model.set_experts_implementation(before)

    @property
    def is_attached(self) -> bool:
        """Whether a strategy or a virtual cluster drives the layer."""
        return _ATTACHED.get(self.experts.module) is self

    def pop_load(self) -> LayerLoad | None:
        """Loads of the training forwards since the last call; None where there was no forward."""
        load, self._load = self._load, None
        return load

    def update_bias(self, loads: Tensor) -> None:
        """Nothing: the router is the model's."""

    def _routing(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Routing:
        nowhere = (top_k_index < 0) | (top_k_index >= self.num_experts)
        idx_TK = top_k_index.to(torch.int64)
        counts = count_by_expert(idx_TK.masked_fill(nowhere, self.num_experts), self.num_experts + 1)[:-1]
        wide = top_k_weights.to(torch.promote_types(x_TD.dtype, torch.float32))
        weights_TK = wide.masked_fill(nowhere, 0)  # whatever it was: it may be infinite
        # What auxiliary losses are made of; the model makes its own.
        no_probabilities = weights_TK.new_zeros(self.num_experts)
        return Routing(idx_TK.masked_fill(nowhere, -1), weights_TK, no_probabilities, weights_TK.new_zeros(()), counts)

    def _add_load(self, counts: Tensor, rank_load: Tensor) -> None:
        load = LayerLoad.without_losses(counts, rank_load)
        self._load = load if self._load is None else self._load + load


def attached_layer(experts: nn.Module) -> ExpertsLayer | None:
    """The layer that somebody drives; None: the module computes for itself."""
    return _ATTACHED.get(experts)


def expert_layers(module: nn.Module) -> dict[str, ExpertsLayer]:
    """A layer for every experts module that one can be made for, by name, in registration order."""
    found = _layers_or_reasons(module)
    return {name: layer for name, layer in found.items() if isinstance(layer, ExpertsLayer)}


def check_expert_layers(module: nn.Module) -> None:
    """Several ranks will share all experts.

    Raises:
        ValueError: they cannot share those of some experts module; names the first.
    """
    for name, reason in _layers_or_reasons(module).items():
        if not isinstance(reason, ExpertsLayer):
            raise ValueError(f"{name}: {reason}")


def silent_auxiliary_losses(layers: Iterable[Any]) -> str | None:
    """One line for users whose models could balance their experts and do not; None where there is nothing to say."""
    silent = {
        type(layer.model).__name__
        for layer in layers
        if isinstance(layer, ExpertsLayer) and _is_silent(layer.experts.module.config)
    }
    if not silent:
        return None
    return (
        f"{', '.join(sorted(silent))} has an auxiliary loss that balances its experts, and it is off: to add it to the "
        "model's loss set model.config.output_router_logits = True, its factor is router_aux_loss_coef"
    )


def _is_silent(config: Any) -> bool:
    return getattr(config, "output_router_logits", None) is False and getattr(config, "router_aux_loss_coef", 0) != 0


def _layers_or_reasons(module: nn.Module) -> dict[str, ExpertsLayer | str]:
    """By name: layers, those that are attached as they are, or what speaks against one."""
    found: dict[str, ExpertsLayer | str] = {}
    for name, part in module.named_modules():
        if has_experts_interface(part):
            found[name] = attached_layer(part) or _layer_or_reason(part, _modules_around(module, name))
    return found


def _modules_around(module: nn.Module, name: str) -> list[nn.Module]:
    """What the part of that name is in, ``module`` first."""
    around = [module]
    for child in name.split(".")[:-1]:
        around.append(around[-1].get_submodule(child))
    return around if name else []


def _layer_or_reason(experts: nn.Module, around: list[nn.Module]) -> ExpertsLayer | str:
    """``around``: modules it is in, the outermost first."""
    models = [part for part in around if isinstance(part, PreTrainedModel)]
    if not models:
        return _refusal(experts, "got a module outside of any PreTrainedModel, whose setter picks the implementation")
    # PEFT around a whole model changes nothing here.
    inside = around[around.index(models[-1]) + 1 :]
    adapters = [type(part).__name__ for part in inside if type(part).__module__.partition(".")[0] == "peft"]
    if adapters:
        return (
            f"several ranks cannot share the experts of {type(experts).__name__}: got them inside PEFT's {adapters[-1]}"
            ", which would see the weights of this process alone; adapt other layers (target_modules), and to train "
            "experts themselves set requires_grad of their Parameters, instead of target_parameters or modules_to_save"
        )
    if getattr(experts, "_is_expert_parallel", False):
        return _refusal(experts, "got experts that transformers itself has spread over ranks")
    try:
        return ExpertsLayer(experts, models[0])
    except ValueError as error:
        return str(error)


def _refusal(experts: nn.Module, got: str) -> str:
    return (
        f"several ranks cannot share the experts of {type(experts).__name__}: {got}, expected experts in a model of "
        "transformers, each process with all of them; train it on one rank, or with another strategy"
    )
