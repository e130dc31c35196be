"""Dispatchers bring tokens to experts and results back. They decide drops; they own no weights.

* ``LocalDispatcher``: one process has all experts. No host synchronisation.
* ``VirtualDispatcher``: one process drops what a cluster would drop.
* ``SlotDispatcher``: experts sit in slots on several ranks.

Shape suffixes: T tokens, D hidden size, E experts, K top-k, N ranks, R rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.exchange import Exchange
from lightning_swiftmoe.layers.load import count_by_expert, positions_within
from lightning_swiftmoe.layers.router import Routing
from lightning_swiftmoe.placement import (
    CapacityScope,
    Placement,
    host_share,
    kept_counts,
    plan_dispatch,
    slot_capacity,
)
from lightning_swiftmoe.placement.placement import IntArray

ExpertFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_TD, idx_TK, weights_TK) -> y_TD``; ``idx`` counts canonical experts, or residents inside a strategy."""


class Dispatcher(Protocol):
    """Runs the experts of one layer on the local tokens."""

    placement: Placement
    num_processes: int

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertFn, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``y_TD``, the counts ``[N, E]`` routed by each rank, and the load ``[N]`` that each processed."""
        ...


class LocalDispatcher:
    """All experts are here. With a placement on one rank, replicas widen an expert's capacity.

    Args:
        placement: a placement of one rank; None means one slot for each expert.
        num_experts: experts of the layer.
    """

    num_processes = 1

    def __init__(self, num_experts: int, placement: Placement | None = None) -> None:
        self.placement = placement or Placement(np.arange(num_experts)[None], num_experts)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        self._placement = placement
        # As a tensor already: a compiler can follow the forward pass, and needs no new code for a new placement.
        self._replicas = torch.from_numpy(placement.replicas.copy())
        self._slots = placement.slots_per_rank

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertFn, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        idx = routing.topk_idx
        kept = counts = routing.counts
        if capacity_factor is not None:
            slot = slot_capacity(capacity_factor, idx.numel(), self._slots)
            capacity = (slot * self._replicas).to(idx.device, non_blocking=True)
            kept = torch.minimum(counts, capacity)
            idx = drop_beyond(idx, idx, counts, capacity)
        y_TD = experts(x_TD, idx, routing.topk_weights)
        return y_TD, counts[None], kept.sum()[None]


class VirtualDispatcher:
    """Computes with all experts here, but drops as ``N`` ranks with the placement's slots would.

    The tokens of the batch count as split into ``N`` equal contiguous parts, one per virtual rank.
    """

    num_processes = 1

    def __init__(self, placement: Placement, capacity_scope: CapacityScope = "cluster") -> None:
        self.placement, self.capacity_scope = placement, capacity_scope

    @torch.compiler.disable  # decides on the host
    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertFn, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        idx, num_experts = routing.topk_idx, self.placement.num_experts
        num_ranks = self.placement.num_ranks
        if idx.shape[0] % num_ranks:
            raise ValueError(
                f"{num_ranks} virtual ranks cannot share {idx.shape[0]} tokens evenly; change the batch size"
            )
        rank_of_token = torch.arange(idx.shape[0], device=idx.device) // max(idx.shape[0] // num_ranks, 1)
        group = idx + rank_of_token[:, None] * num_experts
        counts = count_by_expert(group, num_ranks * num_experts)
        counts_host = counts.cpu().numpy().reshape(num_ranks, num_experts)
        kept = kept_counts(counts_host, self.placement, capacity_factor, self.capacity_scope)
        if capacity_factor is not None:
            idx = drop_beyond(idx, group, counts, torch.from_numpy(kept).to(idx.device).flatten())
        y_TD = experts(x_TD, idx, routing.topk_weights)
        rank_load = torch.from_numpy(host_share(kept.sum(axis=0), self.placement).sum(axis=1))
        return y_TD, counts.view(num_ranks, num_experts), rank_load.to(idx.device)


class SlotDispatcher:
    """Experts sit in slots on ``N`` ranks; tokens travel to a replica and their results back.

    Args:
        exchange: moves rows between ranks.
        placement: the placement in force; the strategy replaces it after every step.
        layer: the layer's name, for error messages.
        capacity_scope: whose assignments an expert's capacity counts.
    """

    def __init__(
        self, exchange: Exchange, placement: Placement, layer: str, capacity_scope: CapacityScope = "cluster"
    ) -> None:
        self.exchange, self.placement, self.layer = exchange, placement, layer
        self.capacity_scope = capacity_scope
        self.num_processes = exchange.num_ranks

    @torch.compiler.disable  # decides on the host, and communicates
    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertFn, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        idx, rank = routing.topk_idx, self.exchange.rank
        counts = self.exchange.gather_counts(routing.counts, self.layer)
        counts_host = counts.cpu().numpy()
        kept = kept_counts(counts_host, self.placement, capacity_factor, self.capacity_scope)
        plan = plan_dispatch(kept, self.placement, rank)
        order = send_order(idx.reshape(-1), counts_host[rank], plan.send)

        rows = x_TD.to(compute_dtype(x_TD))[order // idx.shape[1]]
        send, recv = plan.send.sum(axis=1).tolist(), plan.recv.sum(axis=1).tolist()
        arrived_RD = self.exchange.move_rows(rows, send, recv, "dispatch", self.layer)
        resident = resident_of_row(plan.recv, self.placement.residents(rank), idx.device)
        done_RD = experts(arrived_RD, resident[:, None], torch.ones_like(resident[:, None], dtype=torch.float32))
        back = self.exchange.move_rows(done_RD, recv, send, "combine", self.layer)
        y_TD = combine(back, order, routing.topk_weights).to(x_TD.dtype)
        return y_TD, counts, torch.from_numpy(plan.rank_load).to(idx.device)


def drop_beyond(idx: Tensor, group: Tensor, counts: Tensor, limit: Tensor) -> Tensor:
    """``idx`` with ``-1`` where an assignment comes later in its group than ``limit`` allows.

    Args:
        idx: ``[T, K]`` experts.
        group: ``[T, K]`` group of each assignment, such as its expert.
        counts: ``[groups]`` assignments in each group.
        limit: ``[groups]`` the first so many are kept.
    """
    flat = group.reshape(-1)
    keep = positions_within(flat, counts) < limit[flat]
    return torch.where(keep.view_as(idx), idx, -1)


def send_order(idx: Tensor, counts: IntArray, send: IntArray) -> Tensor:
    """Numbers of the kept assignments in the order they are sent: by host, then expert, then position in the batch.

    Example: ``idx = [1, 0, 1]``, one assignment of expert 1 to each of two hosts, expert 0 to host 0, gives
    ``[1, 0, 2]``.

    Args:
        idx: ``[n]`` expert of each local assignment.
        counts: ``[E]`` local assignments of each expert.
        send: ``[N, E]`` how many go to each host.
    """
    by_expert = torch.sort(idx, stable=True).indices
    first = np.cumsum(counts) - counts + np.cumsum(send, axis=0) - send
    return by_expert[concatenated_ranges(first.ravel(), send.ravel(), idx.device)]


def concatenated_ranges(starts: IntArray, lengths: IntArray, device: torch.device) -> Tensor:
    """``[start_0, start_0 + 1, ..., start_1, ...]``: ranges of the given starts and lengths, one after the other."""
    total = int(lengths.sum())
    shift = torch.from_numpy(starts - (np.cumsum(lengths) - lengths)).to(device)
    repeats = torch.from_numpy(np.ascontiguousarray(lengths)).to(device)
    return torch.repeat_interleave(shift, repeats, output_size=total) + torch.arange(total, device=device)


def resident_of_row(recv: IntArray, residents: IntArray, device: torch.device) -> Tensor:
    """``[R]`` resident number of each arriving row, in arrival order: by source, then expert.

    Args:
        recv: ``[N, E]`` rows of each expert from each source.
        residents: experts on this rank, ascending.
    """
    here = recv[:, residents]
    numbers = torch.arange(residents.size).repeat(here.shape[0]).to(device)
    repeats = torch.from_numpy(np.ascontiguousarray(here).ravel()).to(device)
    return torch.repeat_interleave(numbers, repeats, output_size=int(here.sum()))


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
