"""Decoupled state: the rows of every expert are cut evenly over all ranks and never move (SwiftMoE).

Rows are what dim 1 of a Parameter counts, whatever a product makes of it: of a matrix that is laid out the other way
they are input columns, of a bias ``[E, rows]`` numbers.

The gradient phase brings every gradient straight to its shard; the weight phase sends fresh weights to wherever the
next placement wants them.

With several expert groups, "all ranks" are those of a group. Gradients of a group's tokens then take one more step: an
all-reduce over the ranks that hold the same shards, ``2 (G - 1) / G * E * own elements`` sent by each of ``G`` groups.
All groups then hold the same totals, and optimizers step alike.

Shape suffixes: N ranks of an expert group, E experts, R residents of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_swiftmoe.parallel.communicator import Pending
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts, Locals, SavedWhole, WeightSource
from lightning_swiftmoe.parallel.shard_exchange import ShardExchange, WireShards
from lightning_swiftmoe.parallel.symmetric_copies import SymmetricCopies
from lightning_swiftmoe.placement import EvenShards, Placement


class DecoupledExperts(HostedExperts):
    """Shards are ``[E, own rows, ...]``, the same cut on every step: ``Shard(1)``."""

    cuts: dict[str, EvenShards]

    def move_state(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Nothing: decoupled state never moves."""

    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The canonical ``[E, rows, ...]`` tensor that has ``shard`` on this rank; None where not received."""
        cut = self.cuts[key]
        missing = cut.chunk_rows - shard.shape[1]
        behind_rows = (0, 0) * (shard.ndim - 2)
        padded = nn.functional.pad(shard.detach(), (*behind_rows, 0, missing))
        gathered = self.communicator.gather_shards(padded, phase, self.name, to)
        if gathered is None:
            return None
        full = gathered.transpose(0, 1).flatten(1, 2)
        return full[:, : cut.rows].contiguous()

    def part(self, key: str, canonical: Tensor) -> Tensor:
        """``[E, own rows, ...]`` of a canonical tensor."""
        start, stop = self.cuts[key].row_interval(self.communicator.rank)
        return canonical[:, start:stop]

    def _saved_part(self, key: str, saved: SavedWhole) -> Tensor:
        """Nothing but this rank's rows are read."""
        if self.mesh is None:
            return saved.whole()
        start, stop = self.cuts[key].row_interval(self.communicator.rank)
        num_experts, _, *row = self.shapes[key]
        local = torch.empty(num_experts, stop - start, *row, dtype=saved.dtype)
        if local.numel():
            saved.read_into(self.wrapped(key, local))
        return local

    def _shard_from(self, source: WeightSource, key: str) -> Tensor:
        """Of no expert more than this rank's rows."""
        rows = slice(*self.cuts[key].row_interval(self.communicator.rank))
        # Copies: rows may be a view of all the others.
        return torch.cat([chunk.clone() for chunk in source(key, rows)])

    def _make_cut(self, shape: torch.Size) -> EvenShards:
        return EvenShards(shape[1], shape[2:].numel(), self.communicator.num_ranks)

    def gradient_memory(self) -> Locals | None:
        """See ``HostedExperts``."""
        if self.accumulates or self.gradient_dtype is not None or not self.exchanges_next():
            return None
        return self._exchange.gradient_memory({key: self._residents[key] for key in self.trainable})

    def _start_gradients(self, grads: Locals) -> Pending[Locals]:
        shards = {key: self.local(key) for key in grads}
        pending = self._exchange.start_gradients(grads, shards, self.placement)
        if self.replicas is None:
            return pending
        return self.communicator.follow(pending, self._sum_over_groups, holding=grads)

    def _sum_over_groups(self, totals: Locals) -> Locals:
        """``totals [E, own rows, ...]`` of this group's tokens become those of all groups', by one all-reduce."""
        assert self.replicas is not None
        flat = torch.cat([total.flatten() for total in totals.values()]).to(self.communicator.device)
        parts = self.replicas.add_up(flat, "gradient", self.name).split([total.numel() for total in totals.values()])
        return {
            key: part.view_as(total).to(total.device, total.dtype)
            for (key, total), part in zip(totals.items(), parts, strict=True)
        }

    def _start_weights(self) -> Pending[None]:
        shards = {key: self.local(key) for key in self.cuts}
        return self._exchange.start_weights(shards, self._residents, self.placement)

    def _make_resident(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._exchange.make_resident(key, shape, dtype)

    @property
    def _reaches_peers(self) -> bool:
        return self.make_exchange is not None and not self.offload

    def _make_copies(self, most: int) -> SymmetricCopies | None:
        return self._exchange.make_copies(most, self.experts.up_name)

    @cached_property
    def _exchange(self) -> ShardExchange:
        if self.make_exchange is not None and self._reaches_peers:
            return self.make_exchange(self.communicator, self.name, self.cuts, self.num_sharers)
        return WireShards(self.communicator, self.name, self.cuts, self.num_sharers, self.state_device)
