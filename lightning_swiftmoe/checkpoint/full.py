"""Full checkpoints: canonical weights and optimizer state, complete on rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_swiftmoe.parallel.expert_tensor import ExpertTensor, local_part
from lightning_swiftmoe.parallel.sharded import ShardHolder, full_name

Owner = tuple[ShardHolder, str]
Holder = TypeVar("Holder", bound=ShardHolder)


def owners(holders: Mapping[str, Holder]) -> dict[nn.Parameter, tuple[Holder, str]]:
    """Whose every sharded Parameter is: the sharded one in ``fit``, the user's own one afterwards."""
    return {
        param: (hosted, key)
        for hosted in holders.values()
        for params in (hosted.originals, hosted.parameters)
        for key, param in params.items()
    }


def full_weights(state_dict: dict[str, Any], module: nn.Module, holders: Mapping[str, ShardHolder]) -> dict[str, Any]:
    """``state_dict`` with sharded weights gathered to rank 0; the other ranks' lacks them. Collective.

    Args:
        state_dict: of ``module``.
        module: the user's.
        holders: by name in it.
    """
    gathered: dict[Owner, Tensor | None] = {}
    for name, (hosted, key) in _sharded_names(module, holders).items():
        if (hosted, key) not in gathered:
            gathered[hosted, key] = hosted.gather_for_checkpoint(key, hosted.local(key))
        whole = gathered[hosted, key]
        if whole is None:
            del state_dict[name]
        else:
            state_dict[name] = whole
    return state_dict


def assembled_weights(
    state_dict: dict[str, Any], module: nn.Module, holders: Mapping[str, ShardHolder], whole: Mapping[Owner, Tensor]
) -> dict[str, Any]:
    """``state_dict`` with expert weights that somebody has already."""
    return state_dict | {name: whole[owner] for name, owner in _sharded_names(module, holders).items()}


def _sharded_names(module: nn.Module, holders: Mapping[str, ShardHolder]) -> dict[str, Owner]:
    """Whose every sharded Parameter is, by every name it has: parts of a module may stand in it twice."""
    of = owners(holders)
    named = module.named_parameters(remove_duplicate=False)
    return {name: of[param] for name, param in named if param in of}


def assembled_optimizer_state(
    optimizer: Optimizer, of: Mapping[nn.Parameter, Owner], whole: Mapping[Owner, dict[str, Any]]
) -> dict[str, Any]:
    """``optimizer.state_dict()`` with state of experts that somebody has already."""
    state_dict = optimizer.state_dict()
    for index, param in enumerate(_params(optimizer)):
        if param in of and index in state_dict["state"]:
            state_dict["state"][index] = whole[of[param]]
    return state_dict


def full_parts(
    parts: Mapping[str, Tensor], holders: Mapping[str, ShardHolder], *, everywhere: bool = False
) -> dict[str, Tensor]:
    """Whole tensors, on the host, of ``parts`` in the shape of this rank's Parameters. Collective.

    Args:
        parts: by name of the Parameter, or of anything that every rank has; in the same order on every rank.
        holders: by name in the user's module.
        everywhere: every rank receives what is sharded; else rank 0 alone, and the other ranks' result lacks it.
    """
    hosts = {full_name(name, key): (hosted, key) for name, hosted in holders.items() for key in hosted.parameters}
    full = {}
    for name, part in parts.items():
        whole: Tensor | None = part
        if name in hosts:
            hosted, key = hosts[name]
            whole = hosted.gather(key, part, "checkpoint") if everywhere else hosted.gather_for_checkpoint(key, part)
        if whole is not None:
            full[name] = whole.cpu()
    return full


def load_full_weights(
    module: nn.Module, state_dict: Mapping[str, Any], holders: Mapping[str, ShardHolder], strict: bool
) -> None:
    """Overwrite the weights of ``module``, some of which are sharded, with canonical ones. Check them before.

    Raises:
        RuntimeError: weights are missing or unknown, and ``strict``.
    """
    dense = dict(state_dict)
    names = _sharded_names(module, holders)
    canonical = {name: dense.pop(name) for name in names if name in dense}
    missing, unexpected = module.load_state_dict(dense, strict=False)
    missing = [name for name in missing if name not in canonical]
    if strict and (missing or unexpected):
        raise RuntimeError(f"the checkpoint lacks {missing} and has unknown {unexpected}")
    with torch.no_grad():
        for name, full in canonical.items():
            hosted, key = names[name]
            hosted.local(key).copy_(hosted.part(key, full))


def full_optimizer_state(optimizer: Optimizer, of: Mapping[nn.Parameter, Owner]) -> dict[str, Any]:
    """``optimizer.state_dict()`` with sharded state gathered to rank 0, on the host; elsewhere None. Collective."""
    state_dict = optimizer.state_dict()
    for index, param in enumerate(_params(optimizer)):
        if param not in of or index not in state_dict["state"]:
            continue
        hosted, key = of[param]
        state = dict(state_dict["state"][index])
        for name in sorted(state):
            if isinstance(state[name], ExpertTensor):
                state[name] = hosted.gather_for_checkpoint(key, local_part(state[name]))
        state_dict["state"][index] = state
    return state_dict


def load_full_optimizer_state(
    optimizer: Optimizer, of: Mapping[nn.Parameter, Owner], state_dict: Mapping[str, Any]
) -> None:
    """``optimizer.load_state_dict`` for a canonical state: each rank keeps its part."""
    params = dict(enumerate(_params(optimizer)))
    states = {}
    for index, state in state_dict["state"].items():
        param = params.get(int(index))
        states[index] = _part(*of[param], state) if param is not None and param in of else state
    optimizer.load_state_dict({**state_dict, "state": states})


def _part(hosted: ShardHolder, key: str, state: Mapping[str, Any]) -> dict[str, Any]:
    shape = hosted.shapes[key]
    return {
        name: hosted.wrapped(key, hosted.part(key, value).contiguous())
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in state.items()
    }


def _params(optimizer: Optimizer) -> list[nn.Parameter]:
    """In the order in which ``state_dict`` numbers them."""
    return [param for group in optimizer.param_groups for param in group["params"]]
