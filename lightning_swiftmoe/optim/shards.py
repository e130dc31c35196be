"""The experts of one layer inside the strategy: residents for computing, shards for the optimizer.

Every parameter of every expert is flattened and cut into ``N`` intervals (``EvenShards``). This rank owns one interval
of each expert, its *shard*: the master weights and, in the user's optimizer, the moments. Shards never move. The
gradient phase brings every gradient to its shard; the weight phase sends fresh weights to wherever the next placement
wants them.

Shape suffixes: N ranks, E experts, R residents of this rank, C columns: the chunks of all parameters side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_swiftmoe.functional import pack_shards, place_shards, sum_shards
from lightning_swiftmoe.optim.hosted import HostedExperts
from lightning_swiftmoe.placement import EvenShards, Placement


class ShardedExperts(HostedExperts):
    """Decoupled state: shards are ``[E, chunk]``, the same cut on every step."""

    cuts: dict[str, EvenShards]

    def move_state(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Nothing: decoupled state never moves."""

    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The canonical ``[E, ...]`` tensor that has ``shard [E, chunk]`` on this rank; None where not received."""
        gathered = self.exchange.gather_shards(shard.detach(), phase, self.name, to)
        if gathered is None:
            return None
        full = gathered.transpose(0, 1).reshape(self.moe.num_experts, -1)[:, : self.cuts[key].num_elements]
        return full.reshape(self.shapes[key]).contiguous()

    def interval(self, key: str, canonical: Tensor) -> Tensor:
        """``[E, chunk]`` of a canonical tensor, zero padded."""
        cut = self.cuts[key]
        start, stop = cut.interval(self.exchange.rank)
        piece = canonical.reshape(self.moe.num_experts, -1)[:, start:stop]
        return nn.functional.pad(piece, (0, cut.chunk - (stop - start)))

    def _make_cut(self, num_elements: int) -> EvenShards:
        return EvenShards(num_elements, self.exchange.num_ranks)

    def _reduce_gradients(self, keys: list[str]) -> None:
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

    def _send_weights(self) -> None:
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        mine = self.placement.residents(rank)
        experts = np.concatenate([self.placement.residents(j) for j in range(num_ranks)])
        with torch.no_grad():
            rows = torch.cat([self._outgoing(key) for key in self.params], dim=1)
            ids = torch.from_numpy(experts).to(rows.device)
            sent = rows[ids].to(self.exchange.device)
            arrived = self.exchange.all_to_all(
                sent, self.placement.num_residents.tolist(), [mine.size] * num_ranks, "weight", self.name
            ).view(num_ranks, mine.size, -1)
            columns = [self.cuts[key].chunk for key in self.params]
            for (key, param), block in zip(self.params.items(), arrived.split(columns, dim=2), strict=True):
                flat = place_shards(block, self.cuts[key].num_elements, param.dtype)
                param.data[: mine.size].view(mine.size, -1).copy_(flat)

    def _packed_gradient(self, key: str, num_residents: int) -> Tensor:
        return pack_shards(self._gradient(key)[:num_residents].flatten(1), self.exchange.num_ranks)

    def _outgoing(self, key: str) -> Tensor:
        return self.shards[key].detach().to(self.params[key].dtype)
