"""The experts of one layer inside the strategy: residents for computing, shards for the optimizer.

Every parameter of every expert is flattened and cut into ``N`` intervals (``EvenShards``). This rank owns one interval
of each expert, its *shard*: the master weights and, in the user's optimizer, the moments. Shards never move. The
gradient phase brings every gradient to its shard; the weight phase sends fresh weights to wherever the next placement
wants them.

Shape suffixes: N ranks, E experts, R residents of this rank, C columns: the chunks of all parameters side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lightning_swiftmoe.exchange import Exchange
from lightning_swiftmoe.functional import pack_shards, place_shards, sum_shards
from lightning_swiftmoe.layers.dispatchers import LocalDispatcher, SlotDispatcher
from lightning_swiftmoe.layers.moe import MoE
from lightning_swiftmoe.placement import CapacityScope, EvenShards, Placement


class ShardedExperts:
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
        self.cuts = {key: EvenShards(shape[1:].numel(), exchange.num_ranks) for key, shape in self.shapes.items()}
        self.shards = {
            key: self._cut(key, (masters or {}).get(key, param.detach())) for key, param in self.params.items()
        }
        self.dirty = False
        self._install(compute_dtype, capacity_scope)

    # -- the three phases of a step --------------------------------------------------------------------------------

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
            return
        residents = self.placement.residents(self.exchange.rank)
        packed = torch.cat([self._packed_gradient(key, residents.size) for key in keys], dim=2)
        sent = packed.flatten(0, 1)
        counts = self.placement.num_residents.tolist()
        arrived = self.exchange.all_to_all(
            sent, [residents.size] * self.exchange.num_ranks, counts, "gradient", self.name
        )
        experts = np.concatenate([self.placement.residents(j) for j in range(self.exchange.num_ranks)])
        ids = torch.from_numpy(experts).to(arrived.device)
        columns = [self.cuts[key].chunk for key in keys]
        for key, block in zip(keys, arrived.split(columns, dim=1), strict=True):
            shard = self.shards[key]
            total = sum_shards(block, ids, self.moe.num_experts, shard.dtype) / self.exchange.num_ranks
            shard.grad = total.to(shard.device)

    def send_weights(self, placement: Placement) -> None:
        """Weight phase: every shard sends its interval to all hosts of its expert under ``placement``, now in force."""
        self.placement = self.moe.dispatcher.placement = placement
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        if num_ranks == 1:
            self._copy_weights()
            return
        mine = placement.residents(rank)
        experts = np.concatenate([placement.residents(j) for j in range(num_ranks)])
        with torch.no_grad():
            rows = torch.cat([self._outgoing(key) for key in self.params], dim=1)
            ids = torch.from_numpy(experts).to(rows.device)
            sent = rows[ids].to(self.exchange.device)
            arrived = self.exchange.all_to_all(
                sent, placement.num_residents.tolist(), [mine.size] * num_ranks, "weight", self.name
            ).view(num_ranks, mine.size, -1)
            columns = [self.cuts[key].chunk for key in self.params]
            for (key, param), block in zip(self.params.items(), arrived.split(columns, dim=2), strict=True):
                flat = place_shards(block, self.cuts[key].num_elements, param.dtype)
                param.data[: mine.size].view(mine.size, -1).copy_(flat)

    # -- canonical weights and state -------------------------------------------------------------------------------

    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The canonical ``[E, ...]`` tensor that has ``shard [E, chunk]`` on this rank; None where not received."""
        gathered = self.exchange.gather_shards(shard.detach(), phase, self.name, to)
        if gathered is None:
            return None
        full = gathered.transpose(0, 1).reshape(self.moe.num_experts, -1)[:, : self.cuts[key].num_elements]
        return full.reshape(self.shapes[key]).contiguous()

    def load(self, key: str, canonical: Tensor) -> None:
        """Overwrite a shard with its interval of ``canonical [E, ...]``. Residents follow with ``send_weights``."""
        with torch.no_grad():
            self.shards[key].copy_(self.interval(key, canonical))

    def interval(self, key: str, canonical: Tensor) -> Tensor:
        """``[E, chunk]`` of a canonical tensor, zero padded."""
        cut = self.cuts[key]
        start, stop = cut.interval(self.exchange.rank)
        piece = canonical.reshape(self.moe.num_experts, -1)[:, start:stop]
        return nn.functional.pad(piece, (0, cut.chunk - (stop - start)))

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

    # -- setting up ------------------------------------------------------------------------------------------------

    def _cut(self, key: str, canonical: Tensor) -> nn.Parameter:
        """A shard keeps at least fp32: low-precision weights would swallow small updates."""
        dtype = torch.promote_types(canonical.dtype, torch.float32)
        device = torch.device("cpu") if self.offload else self.exchange.device
        shard = self.interval(key, canonical).to(device, dtype, copy=True)
        if self.offload and self.exchange.device.type == "cuda":
            shard = shard.pin_memory()
        return nn.Parameter(shard, requires_grad=self.params[key].requires_grad)

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

    def _packed_gradient(self, key: str, num_residents: int) -> Tensor:
        return pack_shards(self._gradient(key)[:num_residents].flatten(1), self.exchange.num_ranks)

    def _take_gradients(self, keys: list[str]) -> None:
        """One rank: residents are the experts in order and the shard is the whole, so nothing needs to move."""
        for key in keys:
            shard = self.shards[key]
            shard.grad = self._gradient(key).flatten(1).to(shard.device, shard.dtype)

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for key, param in self.params.items():
            shard = self.shards[key]
            if shard.dtype == param.dtype and shard.device == param.device:
                param.data = shard.data.view(self.shapes[key])
            else:
                param.data.copy_(shard.view(self.shapes[key]))

    def _outgoing(self, key: str) -> Tensor:
        return self.shards[key].detach().to(self.params[key].dtype)
