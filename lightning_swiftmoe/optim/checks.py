"""Whether the user's optimizers can train sharded experts, and hold all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_swiftmoe.optim.elementwise import check_elementwise, needs_whole_matrices, way_out
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts
from lightning_swiftmoe.parallel.sharded import ShardHolder


def check_optimizers(
    optimizers: Sequence[Optimizer], experts: Mapping[str, HostedExperts], *, trusted: bool = False
) -> None:
    """Every trainable expert Parameter is in some optimizer, and that optimizer can be sharded.

    Args:
        optimizers: the user's.
        experts: by name in the user's module.
        trusted: take the user's word for the second.

    Raises:
        ValueError: a Parameter is missing (its experts would stay frozen while the loss still falls), or the optimizer
            needs whole matrices.
    """
    params = {param: f"{name}.{key}" for name, hosted in experts.items() for key, param in hosted.parameters.items()}
    held = [{param for group in opt.param_groups for param in group["params"]} for opt in optimizers]
    for param, name in params.items():
        if param.requires_grad and not any(param in others for others in held):
            raise ValueError(_in_no_optimizer(name, optimizers))
    for optimizer, others in zip(optimizers, held, strict=True):
        if not trusted and not others.isdisjoint(params):
            check_elementwise(optimizer, params.keys())


def check_steps_on_shards(optimizers: Sequence[Optimizer], dense: ShardHolder) -> None:
    """Raise a ValueError for an optimizer that would step otherwise on parts of dense Parameters."""
    params = set(dense.parameters.values())
    for optimizer in optimizers:
        if not any(param in params for group in optimizer.param_groups for param in group["params"]):
            continue
        try:
            check_elementwise(optimizer, params)
        except ValueError as error:
            raise ValueError(
                f"dense='fsdp2' gives {type(optimizer).__name__} parts of dense Parameters; use dense='ddp' for it: "
                f"{error}"
            ) from None


def _in_no_optimizer(name: str, optimizers: Sequence[Optimizer]) -> str:
    names = [type(optimizer).__name__ for optimizer in optimizers]
    where = ", ".join(name for name in names if not name.startswith("_"))  # Lightning stands in for none
    message = (
        f"{name} is trainable but in no optimizer ({where or 'there is none'}): pass it to one in "
        "configure_optimizers, or freeze it with requires_grad_(False)"
    )
    unfit = next(filter(needs_whole_matrices, optimizers), None)
    return message if unfit is None else f"{message}. {type(unfit).__name__} cannot train experts: {way_out(unfit)}"


def use_installed_parameters(optimizer: Optimizer, holders: Iterable[ShardHolder]) -> None:
    """An optimizer that was made before ``fit`` holds the canonical Parameters: give it the sharded ones, in place."""
    installed = {
        original: (hosted, key)
        for hosted in holders
        for key, original in hosted.originals.items()
        if hosted.parameters[key] is not original
    }
    for group in optimizer.param_groups:
        for index, param in enumerate(group["params"]):
            if param not in installed:
                continue
            hosted, key = installed[param]
            group["params"][index] = hosted.parameters[key]
            if param in optimizer.state:
                state = optimizer.state.pop(param)
                optimizer.state[hosted.parameters[key]] = _sharded_state(optimizer, state, hosted, key)


def _sharded_state(optimizer: Optimizer, state: dict[str, Any], hosted: ShardHolder, key: str) -> dict[str, Any]:
    shape = hosted.shapes[key]
    result = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            local = hosted.part(key, value).to(hosted.state_device, copy=True).contiguous()
            result[name] = hosted.wrapped(key, local)
        else:
            result[name] = value
    return result


def use_original_parameters(optimizer: Optimizer, holders: Iterable[ShardHolder]) -> None:
    """After ``fit`` the optimizer holds the user's own Parameters again; its state stays sharded until it is saved."""
    originals = {param: hosted.originals[key] for hosted in holders for key, param in hosted.parameters.items()}
    for group in optimizer.param_groups:
        group["params"] = [originals.get(param, param) for param in group["params"]]
    for param, original in originals.items():
        if param is not original and param in optimizer.state:
            optimizer.state[original] = optimizer.state.pop(param)
