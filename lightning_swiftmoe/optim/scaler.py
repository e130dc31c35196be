"""fp16's loss scale on several ranks: an overflow in one rank's shards makes all ranks skip the step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from typing_extensions import override

from lightning_swiftmoe.optim.local_step import on_local_tensors


class SharedScaler(GradScaler):
    """A scaler that asks all ranks whether a gradient overflowed.

    ``torch.distributed.fsdp.ShardedGradScaler`` does too, but its answer of shape ``[1]`` is none that ``fused=True``
    takes (torch 2.13).
    """

    @override
    def unscale_(self, optimizer: Optimizer) -> None:
        """See ``GradScaler``; collective."""
        super().unscale_(optimizer)
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if not found or self._scale is None:
            return
        anywhere = torch.stack([overflow.to(self._scale.device) for overflow in found.values()]).amax()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        for overflow in found.values():
            overflow.copy_(anywhere)


def shared_scaler(scaler: GradScaler, device: str) -> SharedScaler:
    """One that goes on from where ``scaler`` is.

    Args:
        scaler: the user's, or Lightning's.
        device: type of the device that the ranks compute on.
    """
    shared = SharedScaler(
        device,
        init_scale=scaler.get_scale(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_factor=scaler.get_growth_factor(),
        growth_interval=scaler.get_growth_interval(),
    )
    shared.load_state_dict(scaler.state_dict())
    return shared


def unscale(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Divide all gradients of ``optimizer`` by the loss scale, each rank its shards; on several ranks collective.

    Also for optimizers that would do it in their step (``fused=True``): those look for an overflow on their own rank.
    """
    with on_local_tensors(optimizer):
        scaler.unscale_(optimizer)


def holds_scaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether gradients of ``optimizer`` are still multiplied by the loss scale: it has some, and none was divided."""
    if not scaler.is_enabled():
        return False
    if not any(param.grad is not None for group in optimizer.param_groups for param in group["params"]):
        return False
    state = scaler._per_optimizer_states.get(id(optimizer), {})
    return state.get("stage") is not OptState.UNSCALED
