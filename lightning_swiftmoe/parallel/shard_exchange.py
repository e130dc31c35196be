"""How gradients reach the shards of their experts, and fresh weights the slots: the interface, and by all-to-all.

Shape suffixes: N ranks, E experts, R residents of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.functional import Blocks, gather_shards, pack_shards, place_shards, sum_shards
from lightning_swiftmoe.parallel.communicator import Communicator, Pending
from lightning_swiftmoe.parallel.symmetric_copies import SymmetricCopies
from lightning_swiftmoe.placement import EvenShards, Placement

Locals = dict[str, Tensor]
Cuts = Mapping[str, EvenShards]


class ShardExchange(ABC):
    """Moves one layer's expert state between shards and residents."""

    @abstractmethod
    def make_resident(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros ``[>= R, rows, ...]`` on the device for the residents of a parameter. At set-up only."""

    @abstractmethod
    def start_weights(self, shards: Locals, residents: Locals, placement: Placement) -> Pending[None]:
        """Every shard, ``[E, own rows, ...]``, starts on its way into the residents under ``placement``."""

    @abstractmethod
    def start_gradients(self, grads: Locals, shards: Locals, placement: Placement) -> Pending[Locals]:
        """The mean over ranks of every expert's gradient starts on its way to the shards.

        Args:
            grads: ``[>= R, rows, ...]`` by trainable parameter.
            shards: what the gradients are to look like.
            placement: under which they were computed.
        """

    def make_copies(self, most: int, up_name: str) -> SymmetricCopies | None:
        """How experts are lent on the device; None: they are not. Collective, at set-up, behind ``make_resident``.

        Args:
            most: how many of the residents that were made are room for copies.
            up_name: of the up projection.
        """
        return None

    def gradient_memory(self, residents: Locals) -> Locals | None:
        """Where gradients for the next ``start_gradients``, like ``residents``, travel from without a copy.

        The current stream may write there; None: gradients may be anywhere.
        """
        return None


class ShardExchangeFactory(Protocol):
    """Makes the exchange of one layer, on every rank alike."""

    def __call__(self, communicator: Communicator, name: str, cuts: Cuts, num_sharers: int) -> ShardExchange:
        """For the experts ``name``; arguments as for ``WireShards``."""
        ...


class WireShards(ShardExchange):
    """One all-to-all each way: parts of all parameters are packed, travel, and are unpacked.

    Those whose residents differ in dtype, as matrices and biases under autocast, travel one after the other.

    Args:
        communicator: for expert state.
        name: of the layer.
        cuts: who owns what of each parameter.
        num_sharers: ranks that the mean of gradients is over.
        state_device: where shards are.
    """

    def __init__(
        self, communicator: Communicator, name: str, cuts: Cuts, num_sharers: int, state_device: torch.device
    ) -> None:
        self._communicator = communicator
        self._name = name
        self._cuts = cuts
        self._num_sharers = num_sharers
        self._state_device = state_device
        self._keys: dict[torch.dtype, list[str]] = {}  # on every rank alike, which dtypes of gradients need not be
        self._known_blocks: tuple[Placement, dict[torch.device, Blocks]] | None = None

    def make_resident(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``ShardExchange``."""
        self._keys.setdefault(dtype, []).append(key)
        return torch.zeros(shape, dtype=dtype, device=self._communicator.device)

    def start_weights(self, shards: Locals, residents: Locals, placement: Placement) -> Pending[None]:
        """See ``ShardExchange``."""
        parts = [self._start_weights_of(keys, shards, residents, placement) for keys in self._keys.values()]
        return parts[0] if len(parts) == 1 else Pending(lambda: _wait_for_all(parts))

    def _start_weights_of(
        self, keys: list[str], shards: Locals, residents: Locals, placement: Placement
    ) -> Pending[None]:
        rank = self._communicator.rank
        mine = placement.residents(rank).size
        cuts = [self._cuts[key] for key in keys]
        columns = [sum(cut.size(owner) for cut in cuts) for owner in self._ranks]
        blocks = self._blocks(placement, self._state_device)
        dtype = residents[keys[0]].dtype

        @torch.no_grad()
        def make() -> Tensor:
            flat = [shards[key].flatten(1) for key in keys]
            return gather_shards(flat, blocks, dtype).to(self._communicator.device).flatten()

        @torch.no_grad()
        def then(arrived: Tensor) -> None:
            targets = [residents[key].detach()[:mine].flatten(1) for key in keys]
            place_shards(arrived, targets, [cut.bounds for cut in cuts])

        return self._communicator.start(
            make,
            [int(n) * columns[rank] for n in placement.num_residents],
            [mine * c for c in columns],
            "weight",
            self._name,
            then,
        )

    def start_gradients(self, grads: Locals, shards: Locals, placement: Placement) -> Pending[Locals]:
        """See ``ShardExchange``."""
        by_dtype = [{key: grads[key] for key in keys if key in grads} for keys in self._keys.values()]
        parts = [self._start_gradients_of(some, shards, placement) for some in by_dtype if some]
        return parts[0] if len(parts) == 1 else Pending(lambda: _merged(parts))

    def _start_gradients_of(self, grads: Locals, shards: Locals, placement: Placement) -> Pending[Locals]:
        rank = self._communicator.rank
        mine = placement.residents(rank).size
        cuts = [self._cuts[key] for key in grads]
        columns = [sum(cut.size(owner) for cut in cuts) for owner in self._ranks]
        blocks = self._blocks(placement, self._communicator.device)

        def make() -> Tensor:
            return pack_shards([grad[:mine].flatten(1) for grad in grads.values()], [cut.bounds for cut in cuts])

        def then(arrived: Tensor) -> Locals:
            sizes = [cut.size(rank) for cut in cuts]
            rows = arrived.view(blocks.experts.numel(), sum(sizes))
            like = [shards[key] for key in grads]
            totals = sum_shards(rows, sizes, blocks, 1 / self._num_sharers, like[0].dtype)
            return {
                key: total.view_as(shard).to(shard.device)
                for key, total, shard in zip(grads, totals, like, strict=True)
            }

        return self._communicator.start(
            make,
            [mine * c for c in columns],
            [int(n) * columns[rank] for n in placement.num_residents],
            "gradient",
            self._name,
            then,
        )

    def _blocks(self, placement: Placement, device: torch.device) -> Blocks:
        """What the blocks on the wire are of: the residents of every rank, rank by rank."""
        if self._known_blocks is None or not self._known_blocks[0].same_residents(placement):
            experts = np.concatenate([placement.residents(rank) for rank in self._ranks])
            blocks = Blocks.of(torch.from_numpy(experts), placement.num_experts)
            on = {device: blocks.to(device) for device in {self._communicator.device, self._state_device}}
            self._known_blocks = placement, on
        return self._known_blocks[1][device]

    @property
    def _ranks(self) -> range:
        return range(self._communicator.num_ranks)


def _wait_for_all(parts: Sequence[Pending[None]]) -> None:
    for part in parts:
        part.wait()


def _merged(parts: Sequence[Pending[Locals]]) -> Locals:
    return {key: total for part in parts for key, total in part.wait().items()}
