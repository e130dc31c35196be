"""Shards take the place of expert Parameters in the user's optimizers; their state goes back to canonical form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_swiftmoe.optim.elementwise import check_elementwise
from lightning_swiftmoe.optim.hosted import HostedExperts, is_sharded

Owner = tuple[HostedExperts, str]


def check_optimizers(optimizers: Sequence[Optimizer], layers: Sequence[HostedExperts]) -> None:
    """Every trainable expert Parameter is in some optimizer, and that optimizer can be sharded.

    Raises:
        ValueError: a Parameter is missing (its experts would stay frozen while the loss still falls), or the optimizer
            needs whole matrices.
    """
    experts = {param: f"{layer.name}.experts.{key}" for layer in layers for key, param in layer.params.items()}
    held = [{param for group in opt.param_groups for param in group["params"]} for opt in optimizers]
    for param, name in experts.items():
        if param.requires_grad and not any(param in params for params in held):
            raise ValueError(
                f"{name} is trainable but in no optimizer: pass it to one in configure_optimizers, or freeze it with "
                "requires_grad_(False)"
            )
    for optimizer, params in zip(optimizers, held, strict=True):
        if not params.isdisjoint(experts):
            check_elementwise(optimizer)


def insert_shards(optimizer: Optimizer, layers: Iterable[HostedExperts]) -> dict[nn.Parameter, Owner]:
    """Replace expert Parameters by this rank's shards, in place; groups, options and schedulers stay as they are.

    Returns:
        owner of each shard that this optimizer now steps on.
    """
    shard_of = {param: (layer, key) for layer in layers for key, param in layer.params.items()}
    owners: dict[nn.Parameter, Owner] = {}
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            if param not in shard_of:
                continue
            layer, key = shard_of[param]
            shard = layer.shards[key]
            group["params"][i] = shard
            owners[shard] = layer, key
            if param in optimizer.state:
                optimizer.state[shard] = _shard_initial_state(optimizer, optimizer.state.pop(param), param, shard)
    return owners


def _shard_initial_state(
    optimizer: Optimizer, state: dict[str, Any], param: nn.Parameter, shard: nn.Parameter
) -> dict[str, Any]:
    """State that exists before the first step (Adagrad's sum) is one constant everywhere."""
    result = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != param.shape:
            result[key] = value
        elif (value == value.flatten()[0]).all():
            result[key] = torch.full_like(shard, value.flatten()[0].item(), dtype=value.dtype)
        else:
            raise ValueError(
                f"{type(optimizer).__name__} comes with a state {key!r} that differs from element to element before "
                "the first step; create the optimizer without state and resume through ckpt_path"
            )
    return result


def canonical_state(optimizer: Optimizer, owners: dict[nn.Parameter, Owner], to: int | None) -> dict[str, Any]:
    """``optimizer.state_dict()`` with shard-shaped state gathered into canonical ``[E, ...]`` tensors on the host.

    Collective: every rank calls it. Ranks other than ``to`` keep their shards in the result, for shape only.
    """
    state_dict = optimizer.state_dict()
    for index, param in _indexed(optimizer):
        if param not in owners or index not in state_dict["state"]:
            continue
        layer, key = owners[param]
        state = dict(state_dict["state"][index])
        for name in sorted(state):
            if is_sharded(state[name], param):
                full = layer.gather(key, state[name], "checkpoint", to)
                state[name] = state[name] if full is None else full.cpu()
        state_dict["state"][index] = state
    return state_dict


def load_canonical_state(optimizer: Optimizer, owners: dict[nn.Parameter, Owner], state_dict: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` for a canonical state: each rank keeps its intervals."""
    params = dict(_indexed(optimizer))
    states = {}
    for index, state in state_dict["state"].items():
        param = params.get(int(index))
        if param in owners:
            layer, key = owners[param]
            shape = layer.shapes[key]
            state = {
                name: layer.interval(key, value) if isinstance(value, Tensor) and value.shape == shape else value
                for name, value in state.items()
            }
        states[index] = state
    optimizer.load_state_dict({**state_dict, "state": states})


def _indexed(optimizer: Optimizer) -> Iterator[tuple[int, nn.Parameter]]:
    """Parameters by the number ``state_dict`` gives them: their order over all groups."""
    return enumerate(param for group in optimizer.param_groups for param in group["params"])
