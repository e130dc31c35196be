"""What the experts of one layer need inside the strategy, wherever their optimizer state lives.

Residents are for computing: the distinct experts in this rank's slots. Shards are for the optimizer: this rank's part
of the master weights and, in the user's optimizer, of the moments. ``ShardedExperts`` cuts them evenly over all ranks,
once and for all; ``BoundExperts`` keeps them on the hosts of each expert.

Shape suffixes: N ranks, E experts, R residents of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_swiftmoe.exchange import Exchange
from lightning_swiftmoe.layers.dispatchers import LocalDispatcher, SlotDispatcher
from lightning_swiftmoe.layers.moe import MoE
from lightning_swiftmoe.placement import CapacityScope, Placement


class HostedExperts(ABC):
    """Takes over the expert Parameters of ``moe``; ``restore`` gives them back.

    The Parameters stay the same objects. While sharded they hold ``[min(s, E), ...]`` rows, the first ``R`` of which
    are the residents of this rank in ascending order.

    Args:
        moe: the layer, with canonical weights, the same on every rank.
        name: its name in the user's module.
        exchange: the ranks.
        placement: the first placement.
        compute_dtype: dtype of the residents; None keeps that of the Parameters.
        accumulates: whether gradients of several backwards add up in a step; they then add up, and travel, in at least
            fp32. A single one already has the residents' precision and loses nothing.
        offload: keep shards on the host.
        capacity_scope: whose assignments an expert's capacity counts.
        masters: canonical weights in a higher precision than the Parameters', by parameter name, from a checkpoint.
    """

    def __init__(
        self,
        moe: MoE,
        name: str,
        exchange: Exchange,
        placement: Placement,
        *,
        compute_dtype: torch.dtype | None = None,
        accumulates: bool = False,
        offload: bool = False,
        capacity_scope: CapacityScope = "cluster",
        masters: dict[str, Tensor] | None = None,
    ) -> None:
        self.moe, self.name, self.exchange, self.placement = moe, name, exchange, placement
        self.accumulates, self.offload = accumulates, offload
        self.params: dict[str, nn.Parameter] = dict(moe.experts.named_parameters())
        self.shapes = {key: param.shape for key, param in self.params.items()}
        self.dtypes = {key: param.dtype for key, param in self.params.items()}
        self.cuts = {key: self._make_cut(shape[1:].numel()) for key, shape in self.shapes.items()}
        self.shards = {
            key: self._cut(key, (masters or {}).get(key, param.detach())) for key, param in self.params.items()
        }
        self.dirty = False
        self._install(compute_dtype, capacity_scope)

    # -- the phases of a step, in order ----------------------------------------------------------------------------

    def reduce_gradients(self) -> None:
        """Gradient phase: the sum over ranks of every expert's gradient, divided by ``N``, into ``shard.grad``.

        Called again before another backward it does nothing. Parameters without ``requires_grad`` take no part.
        """
        if not self.dirty:
            return
        self.dirty = False
        keys = [key for key, param in self.params.items() if param.requires_grad]
        if not keys:
            return
        if self.exchange.num_ranks == 1:
            self._take_gradients(keys)
        else:
            self._reduce_gradients(keys)

    @abstractmethod
    def move_state(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Migration phase: bring shards and their optimizer state to the owners under ``placement``.

        Args:
            placement: the next one; ``send_weights`` with it follows.
            states: ``optimizer.state`` of the optimizer that steps on the shards.
        """

    def send_weights(self, placement: Placement) -> None:
        """Weight phase: every shard sends its interval to all hosts of its expert under ``placement``, now in force."""
        self.placement = self.moe.dispatcher.placement = placement
        if self.exchange.num_ranks == 1:
            self._copy_weights()
        else:
            self._send_weights()

    # -- canonical weights and state -------------------------------------------------------------------------------

    @abstractmethod
    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The canonical ``[E, ...]`` tensor of which this rank has ``shard``; None where not received (``to``)."""

    @abstractmethod
    def interval(self, key: str, canonical: Tensor) -> Tensor:
        """This rank's shard of a canonical ``[E, ...]`` tensor."""

    def load(self, key: str, canonical: Tensor) -> None:
        """Overwrite a shard with its interval of ``canonical [E, ...]``. Residents follow with ``send_weights``."""
        with torch.no_grad():
            self.shards[key].copy_(self.interval(key, canonical))

    def restore(self) -> None:
        """Give the user's Parameters their full canonical weights back, on every rank."""
        for key, param in self.params.items():
            full = self.gather(key, self.shards[key], "setup")
            assert full is not None
            param.data = full.to(param.device, self.dtypes[key])
            param.grad = None
        self._hooks_off()
        self.moe.dispatcher = LocalDispatcher(self.moe.num_experts)
        self.moe.managed, self.moe.aux_loss_scale = False, 1.0

    # -- what the place of the state decides -----------------------------------------------------------------------

    @abstractmethod
    def _make_cut(self, num_elements: int) -> Any:
        """Who owns what of a parameter with so many elements for each expert."""

    @abstractmethod
    def _reduce_gradients(self, keys: list[str]) -> None:
        """``reduce_gradients`` with several ranks."""

    @abstractmethod
    def _send_weights(self) -> None:
        """``send_weights`` with several ranks, under ``self.placement``."""

    # -- setting up ------------------------------------------------------------------------------------------------

    def _cut(self, key: str, canonical: Tensor) -> nn.Parameter:
        """A shard keeps at least fp32: low-precision weights would swallow small updates."""
        dtype = torch.promote_types(canonical.dtype, torch.float32)
        device = torch.device("cpu") if self.offload else self.exchange.device
        shard = self._pinned(self.interval(key, canonical).to(device, dtype, copy=True))
        return nn.Parameter(shard, requires_grad=self.params[key].requires_grad)

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Host memory that a GPU reads at full speed, where one will."""
        return tensor.pin_memory() if self.offload and self.exchange.device.type == "cuda" else tensor

    def _install(self, compute_dtype: torch.dtype | None, capacity_scope: CapacityScope) -> None:
        rows = min(self.placement.slots_per_rank, self.moe.num_experts)
        hooks: list[Callable[[], None]] = []
        for key, param in self.params.items():
            dtype = compute_dtype if compute_dtype is not None and param.dtype == torch.float32 else param.dtype
            param.data = torch.zeros(rows, *self.shapes[key][1:], dtype=dtype, device=self.exchange.device)
            param.grad = None
            if param.requires_grad:
                hooks.append(param.register_post_accumulate_grad_hook(self._after_backward).remove)
        self._remove_hooks = hooks
        self._accumulated: dict[nn.Parameter, Tensor] = {}
        self.moe.managed = True
        if self.exchange.num_ranks == 1:
            self.moe.dispatcher = LocalDispatcher(self.moe.num_experts, self.placement)
        else:
            self.moe.dispatcher = SlotDispatcher(self.exchange, self.placement, self.name, capacity_scope)
        self.send_weights(self.placement)

    def _hooks_off(self) -> None:
        for remove in self._remove_hooks:
            remove()
        self._remove_hooks = []

    def _after_backward(self, param: Tensor) -> None:
        """Gradients of low-precision residents add up in fp32, not in their own precision."""
        self.dirty = True
        assert isinstance(param, nn.Parameter)
        assert param.grad is not None
        dtype = self._gradient_dtype(param)
        if dtype == param.dtype:
            return
        if param in self._accumulated:
            self._accumulated[param] += param.grad
        else:
            self._accumulated[param] = param.grad.to(dtype)
        param.grad = None

    def _gradient_dtype(self, param: nn.Parameter) -> torch.dtype:
        return torch.promote_types(param.dtype, torch.float32) if self.accumulates else param.dtype

    def _gradient(self, key: str) -> Tensor:
        """This rank's gradient by resident. Where the loss never reached the layer it is zero: others wait for it."""
        param = self.params[key]
        grad = self._accumulated.pop(param, param.grad)
        param.grad = None
        return torch.zeros_like(param, dtype=self._gradient_dtype(param)) if grad is None else grad

    def _take_gradients(self, keys: list[str]) -> None:
        """One rank: residents are the experts in order and the shard is the whole, so nothing needs to move."""
        for key in keys:
            shard = self.shards[key]
            shard.grad = self._gradient(key).reshape(shard.shape).to(shard.device, shard.dtype)

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for key, param in self.params.items():
            shard = self.shards[key]
            if shard.dtype == param.dtype and shard.device == param.device:
                param.data = shard.data.view(self.shapes[key])
            else:
                param.data.copy_(shard.view(self.shapes[key]))


def is_sharded(value: Any, shard: Tensor) -> bool:
    """Whether ``value`` is optimizer state with one number for each element of ``shard``."""
    return isinstance(value, Tensor) and value.shape == shard.shape
