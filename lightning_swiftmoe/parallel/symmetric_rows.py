"""Rows straight into peers' memory, for ranks that reach each other's: no host anywhere, nothing packed.

Tokens are written to their padded, expert-ordered place at the host of their expert, and results are read from there.
One set of buffers serves all layers of a width; barriers on the device keep one layer's rows apart from the next's.
There is one after rows are written, and one after results are. What arrived in a forward is used up before the second;
what arrived in a backward is used until the layer's end, so that the next trip takes the other of two buffers. Tokens
do not wait for the backward where they were computed with: they are written there once more, which takes less time than
their memory is worth.

In training every layer has fixed memory for its plan, and each way, from the counts to the results, is one CUDA graph.
It finds this step's tokens by addresses in device memory, see ``indirect``.

Shape suffixes: T tokens, D hidden size, K top-k, N ranks, E experts, P padded rows of this rank as a host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import is_capturing, tile_rows
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout, row_layout
from lightning_swiftmoe.kernels.expert_mlp.rows_mlp import Spill
from lightning_swiftmoe.kernels.indirect import MOST_TENSORS, point, pointed
from lightning_swiftmoe.kernels.shards.lent_experts import Loans
from lightning_swiftmoe.kernels.token_dispatch.address import Address, address_tokens
from lightning_swiftmoe.kernels.token_dispatch.move import (
    clear_padding,
    pull_rows,
    pull_scalars,
    push_rows,
)
from lightning_swiftmoe.kernels.token_dispatch.token_plan import PlanSize, TokenPlan
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.cuda_graphs import GraphedSections, GraphMemory, identity
from lightning_swiftmoe.parallel.peer_memory import Channel, PeerMemory, SharedTensor
from lightning_swiftmoe.parallel.row_exchange import (
    OfTokens,
    PlacementTables,
    Routed,
    RowExchange,
    RowTrip,
    TokenBound,
    Way,
)

_FORWARD = 1  # the buffer in which rows of forwards arrive

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Buffers:
    """For rows of one width and dtype."""

    arriving: tuple[SharedTensor, SharedTensor]  # [P, D]
    again: tuple[SharedTensor, SharedTensor]  # [P, D]: tokens in a backward
    results: SharedTensor  # [P, D]
    weights: SharedTensor  # [P] fp32: gate weights of arriving rows
    scalars: SharedTensor  # [P] fp32: gradients of gate weights


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What a trip reads on the device beside rows."""

    topk_idx: Tensor  # [T, K]
    counts: Tensor  # [E]
    tables: Tensor  # [N E + E], see PlacementTables
    cells: Tensor  # addresses of what is given to ``travel``

    @classmethod
    def like(cls, routed: Routed, tables: PlacementTables) -> _Inputs:
        """Room for them."""
        topk_idx = torch.empty(routed.topk_idx.shape, dtype=torch.int64, device=routed.topk_idx.device)
        cells = routed.counts.new_empty(MOST_TENSORS)
        return cls(topk_idx, torch.empty_like(routed.counts), torch.empty_like(tables.packed), cells)

    def fit(self, routed: Routed, tables: PlacementTables) -> bool:
        """Whether they have this room."""
        wanted = (routed.topk_idx.shape, routed.counts.shape, tables.packed.shape)
        return (self.topk_idx.shape, self.counts.shape, self.tables.shape) == wanted


@dataclass(frozen=True, eq=False)
class _Planned:
    """One trip."""

    plan: TokenPlan
    address: Address
    facts: Tensor  # [N E + N] int64: counts of all ranks, and the load of each
    parts: tuple[RowLayout, RowLayout] | None  # of rows that are kept and those that are not


class _Desk:
    """What one layer uses on every step: memory for the inputs of its trips, and the ways recorded over it.

    It serves one trip at a time; a trip that begins before the last one has ended uses memory of its own.

    Args:
        number: of the layer, in the order of first use.
        memory: for its graphs alone: what a forward gives lasts to the backward, while other layers' graphs run; None
            where there are none.
    """

    def __init__(self, number: int, memory: GraphMemory | None) -> None:
        self.number = number
        self.sections = GraphedSections(memory)
        self._inputs: _Inputs | None = None
        self._tables: PlacementTables | None = None
        self._most_rows = 0
        self._bounded: tuple[PlacementTables, int] | None = None
        self._trip: weakref.ref[SymmetricTrip] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody uses what is here."""
        trip = None if self._trip is None else self._trip()
        return trip is None or trip.has_ended

    def serve(self, trip: SymmetricTrip) -> None:
        """From now to its end."""
        self._trip = weakref.ref(trip)

    def most_rows(self, tables: PlacementTables, num_assignments: int, tile: int) -> int:
        """Room for any plan so far: it never falls, as with every size recorded ways start anew."""
        if self._bounded is None or self._bounded[0] is not tables or self._bounded[1] != num_assignments:
            self._bounded = tables, num_assignments
            self._most_rows = max(self._most_rows, tables.max_rows(num_assignments, tile))
        return self._most_rows

    def inputs(self, routed: Routed, tables: PlacementTables) -> _Inputs:
        """Where the inputs of a trip always are; those of the placement are there."""
        if self._inputs is None or not self._inputs.fit(routed, tables):
            self._inputs = _Inputs.like(routed, tables)
            self._tables = None
        if tables is not self._tables:
            self._inputs.tables.copy_(tables.packed)
            self._tables = tables
        return self._inputs


class SymmetricRows(RowExchange):
    """Trips through symmetric memory.

    Args:
        communicator: times and watches the trips.
        memory: of its ranks.
        bound: of the assignments of a rank.
    """

    needs_host = False

    def __init__(self, communicator: Communicator, memory: PeerMemory, bound: TokenBound) -> None:
        self.communicator = communicator
        self.device = communicator.device
        self.memory = memory
        self.bound = bound
        self._counts: dict[int, SharedTensor] = {}
        self._buffers: dict[tuple[int, torch.dtype], _Buffers] = {}
        self._workspaces: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._recording_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._desks: dict[str, _Desk] = {}
        self._still_read: int | None = None
        self._captured: list[object] = []  # what graphs of users work on, whatever takes its place here
        # How many rows travel is known on the device alone, and when they do to graphs alone.
        communicator.meter.leave_out("dispatch", "combine", "transient_copies")

    def plan(self, routed: Routed, tables: PlacementTables, name: str, *, training: bool) -> SymmetricTrip:
        """See ``RowExchange.plan``: the plan itself is made at the beginning of the first way."""
        tile = tile_rows(self.device)
        num_ranks = self.communicator.num_ranks
        most = num_ranks * self.bound.of(routed.topk_idx.numel(), name)
        desk = self._desk_of(name)
        most_rows = desk.most_rows(tables, most, tile)
        rule = tables.rule
        size = PlanSize(
            tables.max_residents,
            most_rows,
            tile,
            max_copies=rule.transient_copies,
            least_copied=rule.least_copied,
        )
        buffers = self._buffers_for(routed.width, routed.dtype, most + (tables.max_residents + 1) * tile)
        all_counts = self._counts_for(routed.counts.shape[0])
        self.communicator.meter.add("load", (num_ranks - 1) * routed.counts.nbytes)
        fixed = training and desk.is_free
        if fixed:
            inputs = desk.inputs(routed, tables)
        else:
            inputs = _Inputs.like(routed, tables)
            inputs.tables.copy_(tables.packed)
        if is_capturing(self.device):
            self._captured += [buffers, all_counts]
        usual = tables.usual_rows(most // num_ranks, tile)
        kept_rows = most_rows if usual is None else min(usual, most_rows)
        trip = SymmetricTrip(
            self, desk, buffers, routed, inputs, all_counts, size, kept_rows, tables, name, fixed=fixed
        )
        if fixed:
            desk.serve(trip)
        return trip

    def next_buffer(self, trip: SymmetricTrip, way: Way) -> int:
        """Number of the buffers in which the rows of a trip arrive next, once all ranks have used up what was there."""
        number = trip.desk.number % 2 if way == "backward" else _FORWARD
        # Nobody knows what precedes the replays of a graph.
        if number == self._still_read or is_capturing(self.device):
            self.memory.barrier(Channel.ROWS)
        self._still_read = number if way == "backward" else None
        return number

    def workspace(self, use: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """``[rows, width]`` for one way at a time: in graphs' own memory every layer would have one."""
        key = use, width, dtype
        known = self._workspaces.get(key)
        if known is None or known.shape[0] < rows:
            known = self._workspaces[key] = torch.empty(rows, width, dtype=dtype, device=self.device)
        if is_capturing(self.device):
            self._captured.append(known)
        return known[:rows]

    def _desk_of(self, name: str) -> _Desk:
        if name not in self._desks:
            stream = self._recording_stream
            memory = None if stream is None else GraphMemory(self.device, stream)
            self._desks[name] = _Desk(len(self._desks), memory)
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
            if is_capturing(self.device):
                raise RuntimeError(
                    f"a CUDA graph is captured of tokens [., {width}] that need {rows} rows, and there is room for "
                    f"{0 if known is None else known.results.local.shape[0]}: run the model once with as many tokens, "
                    "in the same dtype, before the capture"
                )
            shape = (rows, width)
            self._buffers[key] = _Buffers(
                (self.memory.empty(shape, dtype), self.memory.empty(shape, dtype)),
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
        routed: what this rank sends.
        inputs: where kernels read it.
        all_counts: ``[N, E]``, written by all ranks.
        size: of the plan.
        kept_rows: of which pre-activations wait for the backward.
        tables: the placement.
        name: of the layer.
        fixed: whether inputs and plan stand in the desk's memory.
    """

    resends_tokens = True

    def __init__(
        self,
        exchange: SymmetricRows,
        desk: _Desk,
        buffers: _Buffers,
        routed: Routed,
        inputs: _Inputs,
        all_counts: SharedTensor,
        size: PlanSize,
        kept_rows: int,
        tables: PlacementTables,
        name: str,
        *,
        fixed: bool,
    ) -> None:
        self.desk = desk
        self.buffers = buffers
        self.dtype = buffers.results.local.dtype
        self._exchange = exchange
        self._routed: Routed | None = routed
        self._inputs = inputs
        self._all_counts = all_counts
        self._size = size
        self._kept_rows = kept_rows
        self._tables = tables
        self._copies = tables.copies
        self._name = name
        self._fixed = fixed
        self._planned: _Planned | None = None
        self._buffer = _FORWARD
        self._fetches = False

    def travel(self, way: Way, key: Hashable, work: Callable[..., T], *tensors: Tensor) -> T:
        """See ``RowTrip``."""
        is_first = self._planned is None
        self._buffer = self._exchange.next_buffer(self, way)
        # Another forward may have borrowed other experts since.
        self._fetches = self._copies is not None and not self._copies.are_of(self)
        point(self._inputs.cells, tensors, self._routed_copies())

        def whole() -> tuple[_Planned, T]:
            planned = self._planned = self._planned or self._plan()
            return planned, work(*pointed(self._inputs.cells, tensors))

        if self._fixed and key is not None:
            section = way if is_first or way == "backward" else "forward again"
            feeds = ("forward again", "backward") if section == "forward" else ()
            self._planned, result = self.desk.sections.run(section, self._key(key, tensors), whole, feeds)
        else:
            self._planned, result = whole()
        if self._copies is not None:
            self._copies.keep_for(self)
        if is_first:
            self._tell(self._planned)
        self._exchange.communicator.watch(f"{way} token", self._name)
        return result

    def to_hosts(self, tokens_TD: OfTokens, weights_TK: OfTokens) -> tuple[Tensor, Tensor]:
        """See ``RowTrip``."""
        rows_PD = self._push(tokens_TD, self.buffers.arriving, weights_TK)
        self._meet()
        return rows_PD, self.buffers.weights.local[: rows_PD.shape[0]]

    def gradients_to_hosts(self, grads_TD: OfTokens, tokens_TD: OfTokens | None = None) -> tuple[Tensor, Tensor | None]:
        """See ``RowTrip``."""
        grads_PD = self._push(grads_TD, self.buffers.arriving)
        rows_PD = None if tokens_TD is None else self._push(tokens_TD, self.buffers.again)
        self._meet()
        return grads_PD, rows_PD

    def _meet(self) -> None:
        """A barrier; copies are fetched while others are still on their way to it."""
        if self._copies is None or not self._fetches:
            self._exchange.memory.barrier(Channel.ROWS)
            return
        self._exchange.memory.arrive(Channel.ROWS)
        self._copies.fetch(self._loans)
        self._exchange.memory.wait(Channel.ROWS)

    def with_loans(self, grad_up: Tensor | None, grad_down: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """See ``RowTrip``."""
        grads = grad_up, grad_down
        if self._copies is not None:
            self._copies.offer(self._loans, grads)
            self._exchange.memory.barrier(Channel.ROWS)
            self._copies.collect(self._loans, grads)
        return grads

    def _push(
        self,
        tokens_TD: OfTokens,
        buffers: tuple[SharedTensor, SharedTensor],
        weights_TK: OfTokens | None = None,
    ) -> Tensor:
        """Start rows on their way; gives those that will be here after the barrier."""
        plan, address = self._here.plan, self._here.address
        buffer = buffers[self._buffer]
        rows_PD = buffer.local[: plan.size.max_rows]
        clear_padding(rows_PD, plan.starts, plan.ends)
        places = None if weights_TK is None else self.buffers.weights.peers
        push_rows(tokens_TD, address, buffer.peers, weights_TK, places, self.dtype)
        return rows_PD

    def offer(self, rows_PD: Tensor, scalars_P: Tensor | None = None) -> None:
        """See ``RowTrip``."""
        results, scalars = self.buffers.results.local, self.buffers.scalars.local
        if rows_PD.data_ptr() != results.data_ptr():
            results[: rows_PD.shape[0]].copy_(rows_PD)
        if scalars_P is not None:
            scalars[: scalars_P.shape[0]].copy_(scalars_P)
        self._exchange.memory.arrive(Channel.ROWS)

    def to_tokens(self, rows_PD: Tensor, out_TD: OfTokens, weights_TK: OfTokens | None = None) -> None:
        """See ``RowTrip``."""
        self._exchange.memory.wait(Channel.ROWS)
        pull_rows(self._here.address, self.buffers.results.peers, weights_TK, out_TD, self.dtype)

    def scalars_to_tokens(self, scalars_P: Tensor, out_TK: OfTokens) -> None:
        """See ``RowTrip``."""
        pull_scalars(self._here.address, self.buffers.scalars.peers, out_TK)

    def result_buffer(self, like_PD: Tensor) -> Tensor | None:
        """See ``RowTrip``."""
        return self.buffers.results.local[: self._size.max_rows]

    def workspace(self, width: int) -> Tensor | None:
        """See ``RowTrip``."""
        return self._exchange.workspace("hidden values", self._size.max_rows, width, self.dtype)

    def spill_memory(self, width: int) -> Tensor | None:
        """See ``RowTrip``."""
        if not self._spills:
            return None
        return self._exchange.workspace("pre-activations", self._size.max_rows, width, self.dtype)

    def spill(self, memory: Tensor) -> Spill:
        """See ``RowTrip``."""
        assert self._here.parts is not None, "spill_memory has none"
        return Spill(*self._here.parts, memory)

    @property
    def _spills(self) -> bool:
        return self._kept_rows < self._size.max_rows

    @property
    def layout(self) -> RowLayout:  # type: ignore[override]
        """See ``RowTrip``."""
        plan = self._here.plan
        return RowLayout(plan.starts, plan.ends, plan.order, plan.tile_expert, plan.num_rows, plan.size.tile)

    @property
    def _loans(self) -> Loans:
        plan = self._here.plan
        return Loans(plan.copies, plan.lenders, self._tables.multiplicity(self._inputs.tables), plan.rank)

    @property
    def _here(self) -> _Planned:
        assert self._planned is not None, "to_hosts comes first"
        return self._planned

    def _routed_copies(self) -> list[tuple[Tensor, Tensor]]:
        """What the plan is made from, to where kernels read it; once."""
        routed, self._routed = self._routed, None
        if routed is None:
            return []
        topk_idx, counts = routed.topk_idx.contiguous(), routed.counts.contiguous()
        return [(topk_idx, self._inputs.topk_idx), (counts, self._inputs.counts)]

    def _plan(self) -> _Planned:
        inputs = self._inputs
        num_ranks, num_experts = self._all_counts.local.shape
        self._exchange.memory.exchange_counts(inputs.counts, self._all_counts)
        facts = inputs.counts.new_empty(num_ranks * (num_experts + 1))
        counts, rank_load = facts[:-num_ranks].view(num_ranks, num_experts), facts[-num_ranks:]
        # Peers write the next counts when this trip's first barrier has passed.
        counts.copy_(self._all_counts.local)
        plan = self._tables.plan(counts, self._exchange.communicator.rank, self._size, inputs.tables)
        rank_load.copy_(plan.rank_load)
        return _Planned(plan, address_tokens(inputs.topk_idx, plan), facts, self._parts(plan))

    def _parts(self, plan: TokenPlan) -> tuple[RowLayout, RowLayout] | None:
        if not self._spills:
            return None
        kept, tile = self._kept_rows, plan.size.tile
        first = row_layout(plan.starts, plan.ends, kept, tile)
        return first, row_layout(plan.starts, plan.ends, plan.size.max_rows - kept, tile, kept)

    def _tell(self, planned: _Planned) -> None:
        """Counts and loads, in memory that stays as it is."""
        num_ranks, num_experts = self._all_counts.local.shape
        facts = planned.facts.clone() if self._fixed else planned.facts
        self.counts = facts[:-num_ranks].view(num_ranks, num_experts)
        self.rank_load = facts[-num_ranks:]

    def _key(self, key: Hashable, given: Sequence[Tensor]) -> Hashable:
        """All that the launches of a way depend on."""
        inputs = self._inputs
        fixed = identity(inputs.topk_idx, inputs.counts, inputs.tables, inputs.cells, self._all_counts.local)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        planned = None if self._planned is None else identity(self._planned.facts, self._planned.address.row)
        # Buffers are made anew all at once.
        buffers = identity(self.buffers.results.local), self._buffer
        sizes = self._size, self._kept_rows
        return key, fixed, shapes, planned, sizes, self._tables.capacity, buffers, self._fetches
