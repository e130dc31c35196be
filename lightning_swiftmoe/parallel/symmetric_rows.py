"""Rows straight into peers' memory, for ranks that reach each other's: no host anywhere, nothing packed.

Tokens are written to their padded, expert-ordered place at the host of their expert, and results are read from there.
One set of buffers serves all layers of a width; barriers on the device keep one layer's rows apart from the next's.
There is one after rows are written, and one after results are. What arrived in a forward is used up before the second;
what arrived in a backward is used until the layer's end, so that the next trip takes the other of two buffers.

In training every layer has fixed memory for its plan, and what happens between two journeys becomes a CUDA graph.

Shape suffixes: T tokens, D hidden size, K top-k, N ranks, E experts, P padded rows of this rank as a host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import tile_rows
from lightning_swiftmoe.kernels.row_layout import RowLayout
from lightning_swiftmoe.kernels.token_dispatch.address import Address, address_tokens
from lightning_swiftmoe.kernels.token_dispatch.move import (
    clear_padding,
    pull_rows,
    pull_scalars,
    push_rows,
)
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize, TokenPlan
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.cuda_graphs import GraphedSection, GraphMemory, identity
from lightning_swiftmoe.parallel.peer_memory import Channel, PeerMemory, SharedTensor
from lightning_swiftmoe.parallel.row_exchange import PlacementTables, Routed, RowExchange, RowTrip, TokenBound

_FORWARD = 1  # the buffer in which rows of forwards arrive

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Buffers:
    """For rows of one width and dtype."""

    arriving: tuple[SharedTensor, SharedTensor]  # [P, D]
    results: SharedTensor  # [P, D]
    weights: SharedTensor  # [P] fp32: gate weights of arriving rows
    scalars: SharedTensor  # [P] fp32: gradients of gate weights


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What a plan is made from on the device."""

    topk_idx: Tensor  # [T, K]
    counts: Tensor  # [E]
    multiplicity: Tensor  # [N, E]
    replicas: Tensor  # [E]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, those of the placement last."""
        return [self.topk_idx, self.counts, self.multiplicity, self.replicas]


@dataclass(frozen=True, eq=False)
class _Planned:
    """One trip."""

    counts: Tensor  # [N, E]
    plan: TokenPlan
    address: Address


class _Desk:
    """What one layer uses on every step: memory for the inputs of its plan, and the sections recorded over it.

    It serves one trip at a time; a trip that begins before the last one has ended uses memory of its own.

    Args:
        number: of the layer, in the order of first use.
        memory: for graphs; None where there are none.

    Attributes:
        most_rows: the most rows that a plan of the layer had room for.
    """

    def __init__(self, number: int, memory: GraphMemory | None) -> None:
        self.number = number
        self.most_rows = 0
        self._memory = memory
        self._sections: dict[str, GraphedSection] = {}
        self._inputs: _Inputs | None = None
        self._tables: PlacementTables | None = None
        self._trip: weakref.ref[SymmetricTrip] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody uses what is here."""
        trip = None if self._trip is None else self._trip()
        return trip is None or trip.has_ended

    def serve(self, trip: SymmetricTrip) -> None:
        """From now to its end."""
        self._trip = weakref.ref(trip)

    def hold(self, given: _Inputs, tables: PlacementTables) -> _Inputs:
        """The inputs of a plan, where they always are."""
        mine = self._inputs
        if mine is None or any(a.shape != b.shape for a, b in zip(mine.tensors, given.tensors, strict=True)):
            mine = self._inputs = _Inputs(*(torch.empty_like(tensor) for tensor in given.tensors))
            self._tables = None
        changed = 2 if tables is self._tables else 4
        for old, new in zip(mine.tensors[:changed], given.tensors[:changed], strict=True):
            old.copy_(new)
        self._tables = tables
        return mine

    def run(self, section: str, key: Hashable, work: Callable[[], T]) -> T:
        """See ``GraphedSection``."""
        if self._memory is None:
            return work()
        if section not in self._sections:
            self._sections[section] = GraphedSection(self._memory)
        result: T = self._sections[section].run(key, work)
        return result


class SymmetricRows(RowExchange):
    """Trips through symmetric memory.

    Args:
        communicator: times and watches the trips.
        memory: of its ranks.
        bound: of the assignments of a rank.
    """

    def __init__(self, communicator: Communicator, memory: PeerMemory, bound: TokenBound) -> None:
        self.communicator = communicator
        self.device = communicator.device
        self.memory = memory
        self.bound = bound
        self._counts: dict[int, SharedTensor] = {}
        self._buffers: dict[tuple[int, torch.dtype], _Buffers] = {}
        self._graph_memory = GraphMemory(self.device) if self.device.type == "cuda" else None
        self._desks: dict[str, _Desk] = {}
        self._still_read: int | None = None

    def plan(
        self, routed: Routed, tables: PlacementTables, name: str, *, training: bool
    ) -> tuple[SymmetricTrip, Tensor]:
        """See ``RowExchange.plan``."""
        tile = tile_rows(self.device)
        most = self.communicator.num_ranks * self.bound.of(routed.topk_idx.numel(), name)
        desk = self._desk_of(name)
        # Never falls: with every size recorded sections start anew.
        desk.most_rows = max(desk.most_rows, tables.max_rows(most, tile))
        size = PlanSize(tables.max_residents, desk.most_rows, tile)
        buffers = self._buffers_for(routed.width, routed.dtype, most + (tables.max_residents + 1) * tile)
        all_counts = self._counts_for(routed.counts.shape[0])
        fixed = training and desk.is_free
        inputs = _Inputs(routed.topk_idx, routed.counts, tables.multiplicity, tables.replicas)
        if fixed:
            inputs = desk.hold(inputs, tables)
        work = partial(self._planned, inputs, all_counts, size, tables.capacity)
        with self.communicator.phase("load", name):
            if fixed:
                key = identity(*inputs.tensors), all_counts.local.data_ptr(), size, tables.capacity
                planned = desk.run("plan", key, work)
            else:
                planned = work()
        self.communicator.meter.add("load", (self.communicator.num_ranks - 1) * routed.counts.nbytes)
        trip = SymmetricTrip(self, desk, buffers, planned, name, fixed=fixed)
        if fixed:
            desk.serve(trip)
        return trip, planned.counts.clone()

    def arriving_buffer(self, trip: SymmetricTrip, *, backward: bool) -> SharedTensor:
        """Where the rows of a trip arrive next, once all ranks have used up what was there."""
        number = trip.desk.number % 2 if backward else _FORWARD
        if number == self._still_read:
            self.memory.barrier(Channel.ROWS)
        self._still_read = number if backward else None
        return trip.buffers.arriving[number]

    def _planned(
        self, inputs: _Inputs, all_counts: SharedTensor, size: PlanSize, capacity: Capacity | None
    ) -> _Planned:
        self.memory.exchange_counts(inputs.counts, all_counts)
        # Peers write the next counts when this trip's first barrier has passed.
        gathered = all_counts.local.clone()
        plan = plan_tokens(gathered, inputs.multiplicity, inputs.replicas, self.communicator.rank, size, capacity)
        return _Planned(gathered, plan, address_tokens(inputs.topk_idx, plan))

    def _desk_of(self, name: str) -> _Desk:
        if name not in self._desks:
            self._desks[name] = _Desk(len(self._desks), self._graph_memory)
        return self._desks[name]

    def _counts_for(self, num_experts: int) -> SharedTensor:
        """``[N, E]``, written by all ranks."""
        if num_experts not in self._counts:
            shape = (self.communicator.num_ranks, num_experts)
            self._counts[num_experts] = self.memory.empty(shape, torch.int64)
            self.memory.synchronize()
        return self._counts[num_experts]

    def _buffers_for(self, width: int, dtype: torch.dtype, rows: int) -> _Buffers:
        key = width, dtype
        known = self._buffers.get(key)
        if known is None or known.results.local.shape[0] < rows:
            shape = (rows, width)
            self._buffers[key] = _Buffers(
                (self.memory.empty(shape, dtype), self.memory.empty(shape, dtype)),
                self.memory.empty(shape, dtype),
                self.memory.empty((rows,), torch.float32),
                self.memory.empty((rows,), torch.float32),
            )
            self.memory.synchronize()
        return self._buffers[key]


class SymmetricTrip(RowTrip):
    """Rows are written to, and results read from, the peers' buffers.

    Args:
        exchange: whose.
        desk: of the layer.
        buffers: where rows are.
        planned: the plan.
        name: of the layer.
        fixed: whether the plan stands in the desk's memory.
    """

    def __init__(
        self, exchange: SymmetricRows, desk: _Desk, buffers: _Buffers, planned: _Planned, name: str, *, fixed: bool
    ) -> None:
        plan = planned.plan
        self.desk = desk
        self.buffers = buffers
        self.dtype = buffers.results.local.dtype
        self.rank_load = plan.rank_load.clone()
        self.layout = RowLayout(plan.starts, plan.ends, plan.order, plan.tile_expert, plan.num_rows, plan.size.tile)
        self._exchange = exchange
        self._name = name
        self._plan = plan
        self._address = planned.address
        self._fixed = fixed

    def to_hosts(self, tokens_TD: Tensor, weights_TK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See ``RowTrip``."""
        arriving = self._exchange.arriving_buffer(self, backward=weights_TK is None)
        rows = arriving.local[: self._plan.size.max_rows]
        clear_padding(rows, self._plan.starts, self._plan.ends)
        places = None if weights_TK is None else self.buffers.weights.peers
        with self._exchange.communicator.phase("dispatch", self._name):
            push_rows(tokens_TD.contiguous(), self._address, arriving.peers, weights_TK, places, self.dtype)
            self._exchange.memory.barrier(Channel.ROWS)
        return rows, None if weights_TK is None else self.buffers.weights.local[: self._plan.size.max_rows]

    def offer(self, rows_PD: Tensor, scalars_P: Tensor | None = None) -> None:
        """See ``RowTrip``."""
        results, scalars = self.buffers.results.local, self.buffers.scalars.local
        if rows_PD.data_ptr() != results.data_ptr():
            results[: rows_PD.shape[0]].copy_(rows_PD)
        if scalars_P is not None:
            scalars[: scalars_P.shape[0]].copy_(scalars_P)
        self._exchange.memory.arrive(Channel.ROWS)

    def to_tokens(
        self, rows_PD: Tensor, dtype: torch.dtype, weights_TK: Tensor | None = None, scalars_P: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``RowTrip``."""
        out = rows_PD.new_empty(self._address.row.shape[0], rows_PD.shape[1], dtype=dtype)
        with self._exchange.communicator.phase("combine", self._name):
            self._exchange.memory.wait(Channel.ROWS)
            pull_rows(self._address, self.buffers.results.peers, weights_TK, out, self.dtype)
            scalars = None if scalars_P is None else pull_scalars(self._address, self.buffers.scalars.peers)
        return out, scalars

    def result_buffer(self, like_PD: Tensor) -> Tensor | None:
        """See ``RowTrip``."""
        return self.buffers.results.local[: self._plan.size.max_rows]

    def run(self, section: str, key: Hashable, work: Callable[[], T]) -> T:
        """See ``RowTrip``."""
        if not self._fixed:
            return work()
        buffers = (self.buffers.results.local, self.buffers.scalars.local)
        plan = (self._plan.order, self._plan.starts, self._plan.ends)
        return self.desk.run(section, (key, identity(*buffers, *plan)), work)
