"""Finds the MoE layers of a user's module, ours and those of transformers models, and says what is special of them."""

from __future__ import annotations

from torch import nn

from lightning_swiftmoe.layers.layer import MoELayer, has_experts_interface
from lightning_swiftmoe.layers.moe import MoE


def find_layers(module: nn.Module) -> dict[str, MoELayer]:
    """All MoE layers of ``module`` by name, in registration order, which is the same on every rank.

    Those are ``MoE`` layers and, in models of transformers, experts modules that can be attached; the others are left
    to the model. transformers is imported where such a module is found, and so it is there.
    """
    found = {
        name: part for name, part in module.named_modules() if isinstance(part, MoE) or has_experts_interface(part)
    }
    ours: dict[str, MoELayer] = {name: part for name, part in found.items() if isinstance(part, MoE)}
    if len(ours) == len(found):
        return ours
    from lightning_swiftmoe.hf.layer import expert_layers

    everything = {**ours, **expert_layers(module)}
    return {name: everything[name] for name in found if name in everything}


def check_layers(module: nn.Module) -> None:
    """Several ranks will share all experts of ``module``.

    Raises:
        ValueError: they cannot share those of some experts module of a transformers model.
    """
    if _has_theirs(module):
        from lightning_swiftmoe.hf.layer import check_expert_layers

        check_expert_layers(module)


def planned_on_host(layer: MoELayer) -> bool:
    """Whether the tokens of a layer cannot be planned on a device: its experts are not what our kernels compute."""
    return layer.experts.activation is None


def on_host_line(module: nn.Module) -> str | None:
    """A line for whoever trains ``module`` where other tokens are planned on the device; None: all of them are."""
    slow = {type(layer.experts.module).__name__ for layer in find_layers(module).values() if planned_on_host(layer)}
    if not slow:
        return None
    return (
        f"tokens of {', '.join(sorted(slow))} are planned on the host, which is slower: with biases, a norm, a gate or "
        "a layout of their own, these experts are products of torch around their module's code, not our kernels"
    )


def advice(module: nn.Module) -> str | None:
    """A line for whoever trains ``module``, once; None where there is nothing to say."""
    if not _has_theirs(module):
        return None
    from lightning_swiftmoe.hf.layer import silent_auxiliary_losses

    return silent_auxiliary_losses(find_layers(module).values())


def _has_theirs(module: nn.Module) -> bool:
    return any(has_experts_interface(part) for part in module.modules())
