"""Rows straight into peers' memory, for ranks that reach each other's: no host anywhere, nothing packed.

Tokens are written to their padded, expert-ordered place at the host of their expert, and results are read from there.
One set of buffers serves all layers of a width; barriers on the device keep one layer's rows apart from the next's:

* before rows are written, ``exchange_counts`` (forward) or the barriers of the layer before (backward: two buffers in
  turn) say that the peers have used up what was there;
* after rows are written, and again after results are, a barrier.

Shape suffixes: T tokens, D hidden size, K top-k, N ranks, E experts, P padded rows of this rank as a host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import tile_rows
from lightning_swiftmoe.kernels.row_layout import RowLayout
from lightning_swiftmoe.kernels.token_dispatch.address import Address, address_tokens
from lightning_swiftmoe.kernels.token_dispatch.barrier import Signals, barrier, exchange_counts, pad_size
from lightning_swiftmoe.kernels.token_dispatch.move import (
    clear_padding,
    peer_addresses,
    pull_rows,
    pull_scalars,
    push_rows,
)
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.token_plan import PlanSize, TokenPlan
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.row_exchange import PlacementTables, RowExchange, RowTrip, TokenBound

_COUNTS, _ROWS = 0, 1  # channels
_NUM_CHANNELS = 2


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """A tensor that every rank of a group holds and can reach.

    Args:
        local: this rank's.
        peers: ``[N]`` int64 on the device, the address of every rank's.
        handle: keeps the peers' memory mapped.
    """

    local: Tensor
    peers: Tensor
    handle: Any

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Any) -> SharedTensor:
        """Undefined values. Collective, and waits for all ranks: at set-up only."""
        import torch.distributed._symmetric_memory as symmetric_memory

        local = symmetric_memory.empty(shape, dtype=dtype, device=device)
        handle = symmetric_memory.rendezvous(local, group)
        return cls(local, peer_addresses(list(handle.buffer_ptrs), device), handle)


@dataclass(frozen=True, eq=False)
class _Buffers:
    """For rows of one width and dtype."""

    arriving: tuple[SharedTensor, SharedTensor]  # [P, D], used in turn
    results: SharedTensor  # [P, D]
    weights: SharedTensor  # [P] fp32: gate weights of arriving rows
    scalars: SharedTensor  # [P] fp32: gradients of gate weights


class SymmetricRows(RowExchange):
    """Trips through symmetric memory.

    Args:
        communicator: over ranks that reach each other's memory, with ``group``.
        control: the same ranks, on the host.
        bound: of the assignments of a rank.
    """

    def __init__(self, communicator: Communicator, control: Communicator, bound: TokenBound) -> None:
        self.communicator = communicator
        self.device = communicator.device
        self.bound = bound
        self._control = control
        self._group = communicator.group
        self._signals: Signals | None = None
        self._pads: SharedTensor | None = None
        self._counts: dict[int, list[SharedTensor]] = {}
        self._buffers: dict[tuple[int, torch.dtype], _Buffers] = {}
        self._turn = 0

    def plan(
        self, topk_idx: Tensor, counts: Tensor, like_TD: Tensor, tables: PlacementTables, name: str
    ) -> tuple[SymmetricTrip, Tensor]:
        """See ``RowExchange.plan``."""
        tile = tile_rows(self.device)
        most = self.communicator.num_ranks * self.bound.of(topk_idx.numel(), name)
        size = PlanSize(tables.max_residents, tables.max_rows(most, tile), tile)
        buffers = self._buffers_for(like_TD, most + (tables.max_residents + 1) * tile)
        gathered = self._gather(counts, name)
        plan = plan_tokens(
            gathered, tables.multiplicity, tables.replicas, self.communicator.rank, size, tables.capacity
        )
        address = address_tokens(topk_idx, plan)
        return SymmetricTrip(self, buffers, plan, address, name), gathered

    def turn(self) -> int:
        """Which of two buffers is next."""
        self._turn ^= 1
        return self._turn

    def barrier(self) -> None:
        """Of all ranks, on the device."""
        assert self._signals is not None
        barrier(self._signals, _ROWS)

    def _gather(self, counts: Tensor, name: str) -> Tensor:
        """``[N, E]`` counts of all ranks, in one of two buffers in turn."""
        num_experts = counts.shape[0]
        if self._signals is None:
            self._signals = self._make_signals()
        if num_experts not in self._counts:
            shape = (self.communicator.num_ranks, num_experts)
            self._counts[num_experts] = [self._shared(shape, torch.int64) for _ in range(2)]
            self._synchronize()
        pair = self._counts[num_experts]
        pair.reverse()
        with self.communicator.phase("load", name):
            exchange_counts(counts.contiguous(), pair[0].peers, self._signals, _COUNTS)
        self.communicator.meter.add("load", (self.communicator.num_ranks - 1) * counts.nbytes)
        return pair[0].local

    def _make_signals(self) -> Signals:
        pads = self._shared((pad_size(self.communicator.num_ranks, _NUM_CHANNELS),), torch.int32)
        pads.local.zero_()
        self._pads = pads  # signals are addresses: somebody must hold the memory
        self._synchronize()
        epochs = torch.zeros(_NUM_CHANNELS, dtype=torch.int32, device=self.device)
        return Signals(pads.peers, epochs, self.communicator.rank)

    def _buffers_for(self, like_TD: Tensor, rows: int) -> _Buffers:
        key = like_TD.shape[1], like_TD.dtype
        known = self._buffers.get(key)
        if known is None or known.results.local.shape[0] < rows:
            shape = (rows, like_TD.shape[1])
            self._buffers[key] = _Buffers(
                (self._shared(shape, like_TD.dtype), self._shared(shape, like_TD.dtype)),
                self._shared(shape, like_TD.dtype),
                self._shared((rows,), torch.float32),
                self._shared((rows,), torch.float32),
            )
            self._synchronize()
        return self._buffers[key]

    def _shared(self, shape: tuple[int, ...], dtype: torch.dtype) -> SharedTensor:
        return SharedTensor.empty(shape, dtype, self.device, self._group)

    def _synchronize(self) -> None:
        """At set-up: no rank goes on before all have what was made."""
        torch.cuda.synchronize(self.device)
        dist.barrier(self._control.group)


class SymmetricTrip(RowTrip):
    """Rows are written to, and results read from, the peers' buffers."""

    def __init__(
        self, exchange: SymmetricRows, buffers: _Buffers, plan: TokenPlan, address: Address, name: str
    ) -> None:
        self._exchange = exchange
        self._name = name
        self._buffers = buffers
        self._plan = plan
        self._address = address
        self.rank_load = plan.rank_load
        self.layout = RowLayout(plan.starts, plan.ends, plan.order, plan.tile_expert, plan.num_rows, plan.size.tile)

    def to_hosts(self, tokens_TD: Tensor, weights_TK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See ``RowTrip``."""
        arriving = self._buffers.arriving[self._exchange.turn()]
        rows = arriving.local[: self._plan.size.max_rows]
        clear_padding(rows, self._plan.starts, self._plan.ends)
        places = None if weights_TK is None else self._buffers.weights.peers
        with self._exchange.communicator.phase("dispatch", self._name):
            push_rows(tokens_TD.contiguous(), self._address, arriving.peers, weights_TK, places)
            self._exchange.barrier()
        return rows, None if weights_TK is None else self._buffers.weights.local[: self._plan.size.max_rows]

    def to_tokens(
        self, rows_PD: Tensor, weights_TK: Tensor | None = None, scalars_P: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``RowTrip``."""
        results, scalars = self._buffers.results, self._buffers.scalars
        if rows_PD.data_ptr() != results.local.data_ptr():
            results.local[: rows_PD.shape[0]].copy_(rows_PD)
        if scalars_P is not None:
            scalars.local[: scalars_P.shape[0]].copy_(scalars_P)
        out = rows_PD.new_empty(self._address.row.shape[0], rows_PD.shape[1])
        with self._exchange.communicator.phase("combine", self._name):
            self._exchange.barrier()
            pull_rows(self._address, results.peers, weights_TK, out)
        return out, None if scalars_P is None else pull_scalars(self._address, scalars.peers)

    def result_buffer(self, like_PD: Tensor) -> Tensor | None:
        """See ``RowTrip``."""
        return self._buffers.results.local[: self._plan.size.max_rows]
