"""Decoupled state: the rows of every expert are cut evenly over all ranks and never move (SwiftMoE).

The gradient phase brings every gradient straight to its shard; the weight phase sends fresh weights to wherever the
next placement wants them. Both are one all-to-all a layer.

With several expert groups, "all ranks" are those of a group. Gradients of a group's tokens then take one more step: an
all-reduce over the ranks that hold the same shards, ``2 (G - 1) / G * E * own elements`` sent by each of ``G`` groups.
All groups then hold the same totals, and optimizers step alike.

Shape suffixes: N ranks of an expert group, E experts, R residents of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_swiftmoe.functional import Blocks, gather_shards, pack_shards, place_shards, sum_shards
from lightning_swiftmoe.parallel.communicator import Pending
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts, Locals
from lightning_swiftmoe.placement import EvenShards, Placement


class DecoupledExperts(HostedExperts):
    """Shards are ``[E, own rows, cols]``, the same cut on every step: ``Shard(1)``."""

    cuts: dict[str, EvenShards]
    _known_blocks: tuple[Placement, dict[torch.device, Blocks]] | None = None

    def move_state(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Nothing: decoupled state never moves."""

    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The canonical ``[E, rows, cols]`` tensor that has ``shard`` on this rank; None where not received."""
        cut = self.cuts[key]
        missing = cut.chunk_rows - shard.shape[1]
        padded = nn.functional.pad(shard.detach(), (0, 0, 0, missing))
        gathered = self.communicator.gather_shards(padded, phase, self.name, to)
        if gathered is None:
            return None
        full = gathered.transpose(0, 1).reshape(shard.shape[0], -1, cut.cols)
        return full[:, : cut.rows].contiguous()

    def part(self, key: str, canonical: Tensor) -> Tensor:
        """``[E, own rows, cols]`` of a canonical tensor."""
        start, stop = self.cuts[key].row_interval(self.communicator.rank)
        return canonical[:, start:stop]

    def _make_cut(self, shape: torch.Size) -> EvenShards:
        return EvenShards(shape[1], shape[2], self.communicator.num_ranks)

    def _start_gradients(self, grads: Locals) -> Pending[Locals]:
        residents = self.placement.residents(self.communicator.rank).size
        cuts = [self.cuts[key] for key in grads]
        columns = [sum(cut.size(rank) for cut in cuts) for rank in self._ranks]
        blocks = self._blocks(self.communicator.device)

        def make() -> Tensor:
            return pack_shards([grad[:residents].flatten(1) for grad in grads.values()], [cut.bounds for cut in cuts])

        def then(arrived: Tensor) -> Locals:
            sizes = [cut.size(self.communicator.rank) for cut in cuts]
            rows = arrived.view(blocks.experts.numel(), sum(sizes))
            like = [self.local(key) for key in grads]
            totals = sum_shards(rows, sizes, blocks, 1 / self.num_sharers, like[0].dtype)
            totals = self._sum_over_groups(totals)
            return {
                key: total.view_as(local).to(local.device)
                for key, total, local in zip(grads, totals, like, strict=True)
            }

        return self.communicator.start(
            make,
            [residents * c for c in columns],
            [int(n) * columns[self.communicator.rank] for n in self.placement.num_residents],
            "gradient",
            self.name,
            then,
        )

    def _sum_over_groups(self, totals: list[Tensor]) -> list[Tensor]:
        """``totals [E, own elements]`` of this group's tokens become those of all groups', by one all-reduce."""
        if self.replicas is None:
            return totals
        flat = self.replicas.add_up(torch.cat([total.flatten() for total in totals]), "gradient", self.name)
        parts = flat.split([total.numel() for total in totals])
        return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]

    def _start_weights(self) -> Pending[None]:
        rank = self.communicator.rank
        mine = self.placement.residents(rank).size
        cuts = list(self.cuts.values())
        columns = [sum(cut.size(owner) for cut in cuts) for owner in self._ranks]
        blocks = self._blocks(self.state_device)

        @torch.no_grad()
        def make() -> Tensor:
            shards = [self.local(key).flatten(1) for key in self.cuts]
            dtype = next(iter(self._residents.values())).dtype
            return gather_shards(shards, blocks, dtype).to(self.communicator.device).flatten()

        @torch.no_grad()
        def then(arrived: Tensor) -> None:
            residents = [resident.detach()[:mine].flatten(1) for resident in self._residents.values()]
            place_shards(arrived, residents, [cut.bounds for cut in cuts])

        return self.communicator.start(
            make,
            [int(n) * columns[rank] for n in self.placement.num_residents],
            [mine * c for c in columns],
            "weight",
            self.name,
            then,
        )

    def _blocks(self, device: torch.device) -> Blocks:
        """What the blocks on the wire are of: the residents of every rank, rank by rank."""
        if self._known_blocks is None or not self._known_blocks[0].same_residents(self.placement):
            experts = np.concatenate([self.placement.residents(rank) for rank in self._ranks])
            blocks = Blocks.of(torch.from_numpy(experts), self.placement.num_experts)
            on = {device: blocks.to(device) for device in {self.communicator.device, self.state_device}}
            self._known_blocks = self.placement, on
        return self._known_blocks[1][device]

    @property
    def _ranks(self) -> range:
        return range(self.communicator.num_ranks)
