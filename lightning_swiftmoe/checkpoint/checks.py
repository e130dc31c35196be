"""Does a checkpoint belong to this module and these optimizers? Asked on all ranks before anything is overwritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_swiftmoe.checkpoint.reading import CheckpointError, first_of, listed
from lightning_swiftmoe.optim.elementwise import is_known_elementwise

T = TypeVar("T")

_OTHER = "build the module and its optimizers as they were saved, or choose another checkpoint"


def on_all_ranks(work: Callable[[], T], mark: Callable[[T], Any] = lambda _: None) -> T:
    """``work()``, if no rank's raises and all ranks' results have the same mark; else every rank raises. Collective.

    Args:
        work: not collective, else ranks would wait for one that raised.
        mark: what must be equal on all ranks.

    Raises:
        CheckpointError: another rank failed, or has something else.
        Exception: what ``work`` raised here.
    """
    results: list[T] = []
    error, marked = None, None
    try:
        results.append(work())
        marked = mark(results[0])
    except Exception as caught:
        error = caught
    told = _told_by_all((None if error is None else str(error), marked))
    if error is not None:
        raise error
    for rank, (text, other) in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank} does not load the checkpoint, so nobody does: {text}")
        if other != marked:
            raise CheckpointError(
                f"rank {rank} found another checkpoint under this name: give every host the same file"
            )
    return results[0]


def _told_by_all(mine: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def check_keys(checkpoint: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Whether Lightning will find what it needs.

    Raises:
        CheckpointError: keys are missing.
    """
    if missing := [key for key in keys if key not in checkpoint]:
        advice = "choose a whole checkpoint of a Trainer"
        if "optimizer_states" in missing and "state_dict" in checkpoint:
            advice = "it has weights only, from which a new run starts by load_from_checkpoint, but none resumes"
        raise CheckpointError(f"{listed(missing)} not in the checkpoint, which has {first_of(checkpoint, 8)}: {advice}")


def check_weights(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Whether ``module.load_state_dict`` would overwrite all of the module's tensors, and find a place for all given.

    Submodules that change what they are given, by ``_load_from_state_dict`` or hooks of their own, are left to it.

    Args:
        module: inside or outside ``fit``.
        state_dict: canonical weights.
        strict: names must be the same on both sides.

    Raises:
        CheckpointError: other names or shapes.
    """
    if type(module).load_state_dict is not nn.Module.load_state_dict:
        return
    free = tuple(f"{name}." if name else "" for name, part in module.named_modules() if _loads_its_own_way(part))
    wanted = {name: value for name, value in module.state_dict().items() if not name.startswith(free)}
    if strict:
        _check_names(wanted, {name: value for name, value in state_dict.items() if not name.startswith(free)})
    for name, value in wanted.items():
        if isinstance(value, Tensor) and name in state_dict:
            _check_shape(f"weight {name!r}", state_dict[name], value)


def check_optimizer_states(optimizers: Sequence[Optimizer], states: Any, name_of: Mapping[nn.Parameter, str]) -> None:
    """Whether saved states are of such optimizers, over such Parameters.

    An optimizer that changes what it is given, by ``load_state_dict`` or hooks of its own, is left to it.

    Args:
        optimizers: the user's.
        states: a list of canonical ``optimizer.state_dict()``.
        name_of: Parameters by name, for errors.

    Raises:
        CheckpointError: another number of optimizers, groups or Parameters, another kind of optimizer, other shapes.
    """
    if not isinstance(states, (list, tuple)) or len(states) != len(optimizers):
        got = len(states) if isinstance(states, (list, tuple)) else type(states).__name__
        raise CheckpointError(f"'optimizer_states' has {got} optimizers, the module {len(optimizers)}: {_OTHER}")
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        where = f"optimizer_states[{number}]"
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict or _has_hooks(optimizer):
            continue
        _check_groups(where, optimizer, state)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, values in state["state"].items():
            if not isinstance(index, int) or not 0 <= index < len(params) or not isinstance(values, Mapping):
                raise CheckpointError(
                    f"{where} has state of a Parameter {index!r}, the optimizer has {len(params)} Parameters: {_OTHER}"
                )
            name = name_of.get(params[index], f"number {index}")
            for key, value in values.items():
                if isinstance(value, Tensor) and value.numel() > 1 and is_known_elementwise(optimizer):
                    _check_shape(f"{where}: {key!r} of Parameter {name}", value, params[index])


def _check_groups(where: str, optimizer: Optimizer, state: Any) -> None:
    try:
        sizes = [len(group["params"]) for group in state["param_groups"]]
        settings = [set(group) for group in state["param_groups"]]
        dict(state["state"])
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{where} is no state of an optimizer, which has 'state' and 'param_groups': choose another checkpoint"
        ) from None
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != wanted:
        raise CheckpointError(
            f"{where} has groups of {sizes} Parameters, {type(optimizer).__name__} has groups of {wanted}: {_OTHER}"
        )
    for saved, group in zip(settings, optimizer.param_groups, strict=True):
        lacking, foreign = sorted(set(optimizer.defaults) - saved), sorted(saved - set(group))
        # Other versions of one optimizer lack settings or have more; another optimizer does both.
        if lacking and foreign:
            raise CheckpointError(
                f"{where} is of another optimizer: it has {foreign} and lacks {lacking} of "
                f"{type(optimizer).__name__}: {_OTHER}"
            )


def _check_names(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in given]
    foreign = [name for name in given if name not in wanted]
    told = [f"{listed(missing)} missing"] if missing else []
    told += [f"{listed(foreign)} unknown to the module"] if foreign else []
    if told:
        raise CheckpointError(
            f"of the checkpoint's weights {' and '.join(told)}: {_OTHER}, or set strict_loading = False on the module"
        )


def _check_shape(what: str, got: Any, wanted: Tensor) -> None:
    if not isinstance(got, Tensor):
        raise CheckpointError(f"{what} is a {type(got).__name__} in the checkpoint, not a tensor: {_OTHER}")
    old_scalar = wanted.dim() == 0 and got.shape == (1,)  # torch takes it too
    if got.shape != wanted.shape and not old_scalar:
        raise CheckpointError(
            f"{what} is {list(got.shape)} in the checkpoint, {list(wanted.shape)} in the module: {_OTHER}"
        )


def _has_hooks(optimizer: Optimizer) -> bool:
    return bool(optimizer._optimizer_load_state_dict_pre_hooks)


def _loads_its_own_way(module: nn.Module) -> bool:
    is_torchs = type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
    return not is_torchs or bool(module._load_state_dict_pre_hooks)
