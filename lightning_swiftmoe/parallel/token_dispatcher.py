"""Brings tokens to experts that sit in slots on several ranks, and results back.

* ``HostDispatcher`` plans on the host, from counts that are read there: for ranks whose tokens are in host memory, and
  for any device and dtype.
* ``DeviceDispatcher`` plans on the device; its transport carries rows by NCCL or through symmetric memory.

Shape suffixes: T tokens, D hidden size, E experts, K top-k, N ranks, R rows received.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import aligned, choose_path, is_capturing, runs_without_host
from lightning_swiftmoe.kernels.to_host import to_host
from lightning_swiftmoe.layers.experts import ExpertMLPs
from lightning_swiftmoe.layers.load import in_backward
from lightning_swiftmoe.layers.router import Routing
from lightning_swiftmoe.parallel.borrowed_experts import Loans, borrow
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.compiled_dispatch import KeptByTicket, dispatch_compiled, register
from lightning_swiftmoe.parallel.expert_layer import ExpertLayer
from lightning_swiftmoe.parallel.experts_elsewhere import ExpertsElsewhere, GradientSink
from lightning_swiftmoe.parallel.row_exchange import PlacementTables, Routed, RowExchange, RowTrip
from lightning_swiftmoe.placement import TokenRule, plan_dispatch
from lightning_swiftmoe.placement.placement import IntArray

_tickets = itertools.count()


class HostDispatcher:
    """Plans on the host; rows travel in one all-to-all each way.

    Args:
        layer: whose experts.
        communicator: for tokens.
        name: of the MoE layer, for error messages.
        rule: which assignments are kept, and who processes them.
    """

    def __init__(self, layer: ExpertLayer, communicator: Communicator, name: str, rule: TokenRule) -> None:
        self.layer = layer
        self.communicator = communicator
        self.name = name
        self.rule = rule
        self.num_processes = communicator.num_ranks

    @torch.compiler.disable  # decides on the host, and communicates
    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertMLPs, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.layer.before_tokens(self.name, x_TD)
        idx, rank = routing.topk_idx, self.communicator.rank
        counts = self.communicator.gather_counts(routing.counts, self.name)
        counts_host = to_host(counts).numpy()
        placement = self.layer.placement
        shares = self.rule.share_out(counts_host, placement, capacity_factor)
        plan = plan_dispatch(shares.kept, shares.hosted, rank)
        order = send_order(idx.reshape(-1), counts_host[rank], plan.send)

        rows = x_TD.to(compute_dtype(x_TD))[order // idx.shape[1]]
        send, recv = plan.send.sum(axis=1).tolist(), plan.recv.sum(axis=1).tolist()
        arrived_RD = self.communicator.move_rows(rows, send, recv, "dispatch", self.name)
        loans = None if shares.copied is None else Loans.of(shares.copied, placement, rank)
        # What a bias was added to may be wider than products are.
        done_RD = self._computed(arrived_RD, plan.recv, experts, loans).to(rows.dtype)
        back = self.communicator.move_rows(done_RD, recv, send, "combine", self.name)
        y_TD = combine(back, order, routing.topk_weights).to(x_TD.dtype)
        return y_TD, counts, torch.from_numpy(plan.rank_load).to(idx.device)

    def _computed(self, rows_RD: Tensor, recv: IntArray, experts: ExpertMLPs, loans: Loans | None) -> Tensor:
        """What experts make of the rows that arrived: residents of theirs, and copies of the others."""
        residents = self.layer.residents()
        here = self.layer.placement.residents(self.communicator.rank)
        ones = torch.ones(rows_RD.shape[0], 1, dtype=torch.float32, device=rows_RD.device)
        if loans is not None:
            rows_RD, copies = borrow(rows_RD, residents, loans, self.communicator, self.name)
        resident = resident_of_row(recv, here, rows_RD.device)
        done_RD = experts(rows_RD, resident[:, None], ones, residents)
        if loans is not None and loans.borrowed.size:
            copy = resident_of_row(recv, loans.borrowed, rows_RD.device)
            done_RD = done_RD + experts(rows_RD, copy[:, None], ones, copies)
        return done_RD


class DeviceDispatcher:
    """Plans on the device; rows travel by ``rows`` to their place in expert order, where the expert MLP reads them.

    Args:
        layer: whose experts, with an activation of ours.
        rows: carries rows.
        name: of the MoE layer, for error messages.
        rule: which assignments are kept, and who processes them.
        fallback: for dtypes that the kernels do not take, and for copies where ranks cannot lend them on the device.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        rows: RowExchange,
        name: str,
        rule: TokenRule,
        fallback: HostDispatcher,
    ) -> None:
        self.layer = layer
        self.rows = rows
        self.name = name
        self.rule = rule
        self.num_processes = fallback.num_processes
        self._fallback = fallback
        self._tables: PlacementTables | None = None
        self._last: RowTrip | None = None
        self._number = register(self)
        self._anchor = torch.zeros((), requires_grad=True)
        self._kept: dict[int, KeptByTicket] = {}
        self._kept_in_step = 0
        self._captured: dict[float | None, PlacementTables] = {}

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertMLPs, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._lends_elsewhere or (x_TD.dtype == torch.float64 and x_TD.device.type != "cpu"):
            return self._fallback(x_TD, routing, experts, capacity_factor)
        dtype = compute_dtype(x_TD)
        if torch.compiler.is_compiling():
            known = self._anchor, self._number, self.num_processes
            return dispatch_compiled(x_TD, routing, *known, capacity_factor, dtype)
        given = self._prepare(x_TD, routing, experts, capacity_factor, dtype, torch.is_grad_enabled())
        y_TD = ExpertsElsewhere.apply(x_TD, routing.topk_weights, *given)
        return y_TD, given.trip.counts, given.trip.rank_load

    @property
    def _lends_elsewhere(self) -> bool:
        return self.rule.transient_copies > 0 and self.layer.hosted.transient_copies is None

    def _prepare(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: ExpertMLPs,
        capacity_factor: float | None,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> _Given:
        captured = is_capturing(x_TD.device)
        if captured:
            self._check_capture(experts, dtype)
        self.layer.before_tokens(self.name, x_TD)
        tables = self._tables_on(x_TD.device, capacity_factor)
        if captured:
            tables = self._tables_for_capture(tables)
        routed = Routed(routing.topk_idx, routing.counts, x_TD.shape[1], dtype)
        trip = self._trip(routed, tables, training=experts.training or with_gradients)
        up, down = experts.matrices(self.layer.residents(with_gradients=with_gradients))
        return _Given(up, down, trip, _activation(experts), _ResidentGradients(self.layer, experts))

    def _check_capture(self, experts: ExpertMLPs, dtype: torch.dtype) -> None:
        """Refuse what replays would do wrong.

        Raises:
            RuntimeError: says why, and what to do.
        """
        width, hidden = self.layer.hosted.shapes["down_proj"][1:]
        path = choose_path(self.layer.device, dtype, width, hidden, 1, _activation(experts), "auto")
        obstacle = None
        if self.rows.needs_host:
            obstacle = "this transport waits for the host in every forward: it takes transport='symmetric'"
        elif experts.training or torch.is_grad_enabled():
            obstacle = (
                "the strategy must see every forward whose load or gradients count, and replays pass it by. It records "
                "graphs of a layer's exchange itself: capture the model in eval mode and without gradients"
            )
        elif not runs_without_host(path):
            obstacle = f"products of {dtype} wait for the host: it takes bf16, or fp16 in widths of whole tiles"
        elif self.rule.transient_copies:
            obstacle = "replays would take the room of copies that a backward needs: it takes transient_copies=0"
        elif self.rule.split == "even":
            obstacle = "how much room it needs depends on the placement: it takes split='exact'"
        elif self._tables is None:
            obstacle = "it has not run yet: run it once before the capture"
        if obstacle is not None:
            raise RuntimeError(f"layer {self.name!r} cannot be captured in a CUDA graph: {obstacle}")

    def _tables_for_capture(self, tables: PlacementTables) -> PlacementTables:
        """Tables whose memory will have those of the placement in force, at every replay."""
        if not self._captured:
            self.layer.captures.append(self._refresh_captured)
        return self._captured.setdefault(tables.capacity_factor, tables)

    def _refresh_captured(self) -> None:
        for captured in self._captured.values():
            tables = self._tables_on(captured.packed.device, captured.capacity_factor)
            if tables.packed.shape != captured.packed.shape:
                raise RuntimeError(
                    f"layer {self.name!r} was captured in a CUDA graph, and the next placement has tables of "
                    f"{tables.packed.numel()} numbers where that had {captured.packed.numel()}: capture it anew"
                )
            if tables is not captured:
                captured.packed.copy_(tables.packed)

    def _trip(self, routed: Routed, tables: PlacementTables, *, training: bool) -> RowTrip:
        """A forward that activation checkpointing repeats takes the plan of the first, if it can only be the last."""
        if in_backward() and self._last is not None and self.layer.hosted.forwards_since_backward == 1:
            return self._last
        self._last = None
        trip = self.rows.plan(routed, tables, self.name, training=training)
        if training and not in_backward():
            self._last = trip
        return trip

    def op_forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        capacity_factor: float | None,
        dtype: torch.dtype,
        keeps: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """See ``CompiledDispatcher``."""
        if self._kept_in_step != self.layer.hosted.num_steps:
            self._kept_in_step = self.layer.hosted.num_steps
            self._kept.clear()  # of forwards that nobody went back through
        given = self._prepare(x_TD, routing, self.layer.hosted.experts, capacity_factor, dtype, keeps)
        trip = given.trip
        kept = KeptByTicket((keeps, keeps, keeps and given.up.requires_grad, keeps and given.down.requires_grad))
        y_TD = ExpertsElsewhere.forward(kept, x_TD, routing.topk_weights, *given)
        ticket = next(_tickets)
        if keeps:
            self._kept[ticket] = kept
            if trip.resends_tokens:
                kept.saved_tensors = None, *kept.saved_tensors[1:]
        return y_TD, trip.counts, trip.rank_load, ticket

    def op_backward(self, grad_y: Tensor, x_TD: Tensor, ticket: int) -> tuple[Tensor, Tensor]:
        """See ``CompiledDispatcher``."""
        kept = self._kept.get(ticket)
        if kept is None:
            raise RuntimeError(
                f"layer {self.name!r} has a backward of a forward from before the last optimizer step; go back "
                "through every forward before the optimizer steps, or leave the layer out of torch.compile"
            )
        if kept.saved_tensors[0] is None:
            kept.saved_tensors = aligned(x_TD), *kept.saved_tensors[1:]
        grad_x, grad_weights, *_ = ExpertsElsewhere.backward(kept, grad_y)
        assert grad_x is not None
        assert grad_weights is not None
        if kept.trip.has_ended:
            del self._kept[ticket]
        return grad_x, grad_weights

    def _tables_on(self, device: torch.device, capacity_factor: float | None) -> PlacementTables:
        placement = self.layer.placement
        known = self._tables
        if known is None or known.capacity_factor != capacity_factor or not known.placement.same_residents(placement):
            known = self._tables = PlacementTables.on(
                device, placement, capacity_factor, self.rule, self.layer.hosted.transient_copies
            )
        return known


class _Given(NamedTuple):
    """What ``ExpertsElsewhere`` takes beside tokens and gate weights."""

    up: Tensor
    down: Tensor
    trip: RowTrip
    activation: str
    sink: GradientSink


class _ResidentGradients:
    """``GradientSink`` of a layer."""

    def __init__(self, layer: ExpertLayer, experts: ExpertMLPs) -> None:
        self._hosted = layer.hosted
        self._up_name = experts.up_name

    @property
    def is_empty(self) -> bool:
        return not self._hosted.keeps_given_gradients

    @property
    def copies(self) -> bool:
        return self._hosted.copies_gradients

    def memory(self) -> tuple[Tensor | None, Tensor | None]:
        memory = self._hosted.gradient_memory() or {}
        return memory.get(self._up_name), memory.get("down_proj")

    def take(self, grad_up: Tensor | None, grad_down: Tensor | None) -> None:
        grads = {self._up_name: grad_up, "down_proj": grad_down}
        self._hosted.take_gradients({key: grad for key, grad in grads.items() if grad is not None})


def _activation(experts: ExpertMLPs) -> str:
    assert experts.activation is not None
    return experts.activation


def send_order(idx: Tensor, counts: IntArray, send: IntArray) -> Tensor:
    """Numbers of the kept assignments in the order they are sent: by host, then expert, then position in the batch.

    Example: ``idx = [1, 0, 1]``, one assignment of expert 1 to each of two hosts, expert 0 to host 0, gives
    ``[1, 0, 2]``.

    Args:
        idx: ``[n]`` expert of each local assignment, -1 for none.
        counts: ``[E]`` local assignments of each expert.
        send: ``[N, E]`` how many go to each host.
    """
    of_no_expert = idx.numel() - int(counts.sum())
    by_expert = torch.sort(idx, stable=True).indices[of_no_expert:]
    first = np.cumsum(counts) - counts + np.cumsum(send, axis=0) - send
    return by_expert[concatenated_ranges(first.ravel(), send.ravel(), idx.device)]


def concatenated_ranges(starts: IntArray, lengths: IntArray, device: torch.device) -> Tensor:
    """``[start_0, start_0 + 1, ..., start_1, ...]``: ranges of the given starts and lengths, one after the other."""
    total = int(lengths.sum())
    shift = torch.from_numpy(starts - (np.cumsum(lengths) - lengths)).to(device)
    repeats = torch.from_numpy(np.ascontiguousarray(lengths)).to(device)
    return torch.repeat_interleave(shift, repeats, output_size=total) + torch.arange(total, device=device)


def resident_of_row(recv: IntArray, residents: IntArray, device: torch.device) -> Tensor:
    """``[R]`` resident number of each arriving row, in arrival order: by source, then expert; -1 for other experts.

    Args:
        recv: ``[N, E]`` rows of each expert from each source.
        residents: experts, ascending.
    """
    number = np.full(recv.shape[1], -1)
    number[residents] = np.arange(residents.size)
    here = np.flatnonzero(recv.any(axis=0))
    numbers = torch.from_numpy(np.tile(number[here], recv.shape[0])).to(device)
    repeats = torch.from_numpy(np.ascontiguousarray(recv[:, here]).ravel()).to(device)
    return torch.repeat_interleave(numbers, repeats, output_size=int(recv.sum()))


def combine(rows: Tensor, order: Tensor, weights_TK: Tensor) -> Tensor:
    """``[T, D]`` weighted sum of each token's results; dropped assignments count as zero.

    Args:
        rows: ``[n, D]`` results in send order.
        order: ``[n]`` assignment of each row, all different.
        weights_TK: gate weights; sums are taken in their dtype.
    """
    num_tokens, top_k = weights_TK.shape
    placed = rows.new_zeros(num_tokens * top_k, rows.shape[1]).index_copy(0, order, rows)
    return (placed.view(num_tokens, top_k, rows.shape[1]) * weights_TK[..., None]).sum(dim=1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of ``x`` run in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
