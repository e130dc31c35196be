"""Dispatchers bring tokens to experts and results back. They decide drops; they own no weights.

* ``LocalDispatcher``: one process has all experts. No host synchronisation.
* ``VirtualDispatcher``: one process drops what a cluster would drop.

Those for several ranks: ``lightning_swiftmoe.parallel.token_dispatcher``.

Shape suffixes: T tokens, D hidden size, E experts, K top-k, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.kernels.to_host import to_host
from lightning_swiftmoe.layers.experts import ExpertMLPs
from lightning_swiftmoe.layers.load import count_by_expert, positions_within
from lightning_swiftmoe.layers.router import Routing
from lightning_swiftmoe.placement import CapacityScope, Placement, TokenRule, slot_capacity


class Dispatcher(Protocol):
    """Runs the experts of one layer on the local tokens."""

    num_processes: int

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertMLPs, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``y_TD``, the counts ``[N, E]`` routed by each rank, and the load ``[N]`` that each processed."""
        ...


class AllGroups(Protocol):
    """Where several groups of ranks hold a whole set of experts each."""

    num_processes: int

    def add_up(self, counts: Tensor) -> Tensor:
        """``[E]`` assignments routed by all ranks of the job, from the ``counts [N, E]`` of this rank's group."""
        ...


class LocalDispatcher:
    """All experts are here. With a placement on one rank, replicas widen an expert's capacity.

    Args:
        num_experts: experts of the layer.
        placement: a placement of one rank; None means one slot for each expert.
        capacity_scope: ``"cluster"``: an expert's capacity grows with its replicas; ``"rank"``: it does not;
            ``"pooled"``: all share the capacity of all slots.
        residents: gives the weights to compute with; None: those of the experts themselves.
    """

    num_processes = 1

    def __init__(
        self,
        num_experts: int,
        placement: Placement | None = None,
        capacity_scope: CapacityScope = "cluster",
        residents: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.capacity_scope = capacity_scope
        self.residents = residents
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
        self, x_TD: Tensor, routing: Routing, experts: ExpertMLPs, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        idx = routing.topk_idx
        kept = counts = routing.counts
        if capacity_factor is not None:
            capacity = self._capacity(capacity_factor, idx.numel(), counts)
            kept = torch.minimum(counts, capacity)
            idx = drop_beyond(idx, idx, counts, capacity)
        residents = None if self.residents is None else self.residents()
        y_TD = experts(x_TD, idx, routing.topk_weights, residents)
        return y_TD, counts[None], kept.sum()[None]

    def _capacity(self, capacity_factor: float, num_assignments: int, counts: Tensor) -> Tensor:
        """``[E]`` most assignments of each expert, by the rules of ``placement.TokenRule``."""
        if self.capacity_scope == "pooled":
            room = slot_capacity(capacity_factor, num_assignments, self._slots) * self._slots
            total = counts.sum()
            upper = counts.cumsum(0) * total.clamp_max(room) // total.clamp_min(1)
            return upper.diff(prepend=upper.new_zeros(1))
        if self.capacity_scope == "rank":
            limit = slot_capacity(capacity_factor, num_assignments, self._placement.num_experts)
            capacity = torch.full_like(self._replicas, limit)
        else:
            capacity = slot_capacity(capacity_factor, num_assignments, self._slots) * self._replicas
        return capacity.to(counts.device, non_blocking=True)


class VirtualDispatcher:
    """Computes with all experts here, but drops as ``N`` ranks with the placement's slots would.

    The tokens of the batch count as split into ``N`` equal contiguous parts, one per virtual rank.
    """

    num_processes = 1

    def __init__(self, placement: Placement, rule: TokenRule) -> None:
        self.placement, self.rule = placement, rule

    @torch.compiler.disable  # decides on the host
    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertMLPs, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        idx, num_experts = routing.topk_idx, self.placement.num_experts
        num_ranks = self.placement.num_ranks
        if idx.shape[0] % num_ranks:
            raise ValueError(
                f"{num_ranks} virtual ranks cannot share {idx.shape[0]} tokens evenly; change the batch size"
            )
        rank_of_token = torch.arange(idx.shape[0], device=idx.device) // max(idx.shape[0] // num_ranks, 1)
        num_groups = num_ranks * num_experts
        group = torch.where(idx < 0, num_groups, idx + rank_of_token[:, None] * num_experts)
        counts = count_by_expert(group, num_groups + 1)[:-1]  # without those of no expert
        counts_host = to_host(counts).numpy().reshape(num_ranks, num_experts)
        shares = self.rule.share_out(counts_host, self.placement, capacity_factor)
        if capacity_factor is not None:
            idx = drop_beyond(idx, group, counts, torch.from_numpy(shares.kept).to(idx.device).flatten())
        y_TD = experts(x_TD, idx, routing.topk_weights)
        rank_load = torch.from_numpy(shares.hosted.sum(axis=1))
        return y_TD, counts.view(num_ranks, num_experts), rank_load.to(idx.device)


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
