"""Bytes that every rank sends and receives, by phase, from a placement and its loads. Exact but where it says so.

Shards are taken to be equal: where ``N`` does not divide a parameter, the exchange pads it by less than ``N`` elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.placement import Placement, keep_within_capacity
from lightning_swiftmoe.placement.bound_shards import BoundShards
from lightning_swiftmoe.placement.exact_split import keep_within_ranks
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.placement.residency import Residency
from lightning_swiftmoe.placement.transfer import (
    WeightReplicas,
    changed_experts,
    moved_elements,
    transfer_plan,
    weight_plan,
)
from lightning_swiftmoe.placement.transient_copies import PooledSplit, lenders
from lightning_swiftmoe.simulate.model import ModelShape
from lightning_swiftmoe.simulate.systems import DIRECT, PUBLISHED

FloatArray = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Flow:
    """What each rank sends to and receives from *other* ranks.

    Args:
        sent_bytes: ``[N]``.
        received_bytes: ``[N]``.
    """

    sent_bytes: FloatArray
    received_bytes: FloatArray

    @property
    def total_bytes(self) -> float:
        """Sent by all ranks together."""
        return float(self.sent_bytes.sum())

    def busiest_bytes(self, duplex: float = 1.0) -> float:
        """What the busiest rank moves, one direction after the other as far as the two do not overlap.

        Args:
            duplex: part of the smaller direction that moves during the larger one: 1 on a full duplex link (the larger
                direction counts), 0 where directions take turns (their sum counts).
        """
        smaller, larger = np.sort([self.sent_bytes, self.received_bytes], axis=0)
        return float((larger + (1 - duplex) * smaller).max())

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes)


def no_flow(num_ranks: int) -> Flow:
    """Nothing moves."""
    return Flow(np.zeros(num_ranks), np.zeros(num_ranks))


@dataclass(frozen=True, eq=False)
class Copies:
    """Transient copies of one layer in one step; ``placement.transient_copies.lenders`` says which host lends.

    Args:
        fetched: ``[N]`` copies on each rank.
        served: ``[N]`` copies that each rank lends.
    """

    fetched: FloatArray
    served: FloatArray


def no_copies(num_ranks: int) -> Copies:
    """Nobody borrows."""
    return Copies(np.zeros(num_ranks), np.zeros(num_ranks))


@dataclass(frozen=True, eq=False)
class Routed:
    """One layer of one step, in assignments.

    Args:
        kept: ``[E]`` assignments processed: ``min(load, slot_capacity * replicas)``.
        rank_load: ``[N]`` assignments each rank processes.
        offered_load: ``[N]`` assignments each rank would process without drops.
        sent: ``[N]`` assignments each rank sends to others.
        received: ``[N]`` assignments each rank gets from others.
        copies: that some of them are processed with.
    """

    kept: IntArray
    rank_load: FloatArray
    offered_load: FloatArray
    sent: FloatArray
    received: FloatArray
    copies: Copies


def route(counts: IntArray, residency: Residency, slot_capacity: int) -> Routed:
    """Drop what is over capacity and spread the rest evenly over the replicas, ranks serving themselves first.

    Args:
        counts: ``[N, E]`` assignments by source; ``[1, E]`` when only the sum is known, then every rank is taken to
            route an equal part of each expert's load (sent and received are then within one assignment per expert).
        residency: of the placement in force.
        slot_capacity: assignments per slot; 0 drops nothing.
    """
    load = counts.sum(axis=0, dtype=np.int64)
    offered, share = _split_evenly(load, residency, slot_capacity)
    kept = np.bincount(residency.expert, weights=share, minlength=load.size).astype(np.int64)
    num_ranks = residency.placement.num_ranks
    if len(counts) == num_ranks:
        by_source = keep_within_capacity(counts, kept)
        local = np.minimum(by_source[residency.rank, residency.expert], share)
        from_rank = by_source.sum(axis=1)
    else:
        local = np.minimum(kept[residency.expert] / num_ranks, share)
        from_rank = np.full(num_ranks, kept.sum() / num_ranks)
    rank_load, stays = residency.sum_by_rank(share), residency.sum_by_rank(local)
    offered_load = residency.sum_by_rank(offered)
    return Routed(kept, rank_load, offered_load, from_rank - stays, rank_load - stays, no_copies(num_ranks))


def _split_evenly(load: IntArray, residency: Residency, slot_capacity: int) -> tuple[IntArray, IntArray]:
    """``[R]`` assignments that each pair would process without drops, and does."""
    offered = residency.share(load)
    if not slot_capacity:
        return offered, offered
    return offered, residency.share(np.minimum(load, slot_capacity * residency.placement.replicas))


def route_pooled(counts: IntArray, placement: Placement, rank_capacity: int, split: PooledSplit) -> Routed:
    """The same where the slots of a rank share their room.

    Args:
        counts: as of ``route``.
        placement: in force.
        rank_capacity: assignments of a rank; 0 drops nothing.
        split: over hosts and copies.
    """
    num_ranks = placement.num_ranks
    offered = split(counts.sum(axis=0, dtype=np.int64), placement)
    share = keep_within_ranks(offered.hosted, rank_capacity) if rank_capacity else offered.hosted
    kept = share.sum(axis=0)
    if len(counts) == num_ranks:
        by_source = keep_within_capacity(counts, kept)
    else:
        by_source = np.broadcast_to(kept / num_ranks, share.shape)
    stays = np.minimum(by_source, share).sum(axis=1)
    rank_load = share.sum(axis=1)
    sent = by_source.sum(axis=1) - stays
    copies = _copies(offered.copied, placement)
    return Routed(kept, rank_load, offered.hosted.sum(axis=1), sent, rank_load - stays, copies)


def _copies(copied: NDArray[np.bool_], placement: Placement) -> Copies:
    lender = lenders(copied, placement)
    served = np.bincount(lender[copied], minlength=placement.num_ranks)
    return Copies(copied.sum(axis=1).astype(float), served.astype(float))


@dataclass(frozen=True, eq=False)
class CopyFlow:
    """What transient copies move.

    Args:
        weights: from hosts to copies, once.
        gradients: from copies to the hosts that lent them.
        fetches: how often the weights travel: for the forward, and again for the backward where nobody keeps them.
    """

    weights: Flow
    gradients: Flow
    fetches: int

    @property
    def total_bytes(self) -> float:
        """Sent by all ranks together."""
        return self.fetches * self.weights.total_bytes + self.gradients.total_bytes


def copy_flow(copies: Copies, model: ModelShape, fetches: int) -> CopyFlow:
    """Of one layer and step; gradients go back the way that the weights came."""
    weights = Flow(copies.served * model.weight_expert_bytes, copies.fetched * model.weight_expert_bytes)
    gradients = Flow(copies.fetched * model.grad_expert_bytes, copies.served * model.grad_expert_bytes)
    return CopyFlow(weights, gradients, fetches)


def gradient_flow(residency: Residency, model: ModelShape, state: str, all_reduce: bool) -> Flow:
    """Gradients from the residents to the optimizer state.

    Direct: each resident's gradient, cut N ways, to N ranks: ``residents * G * (N-1)/N`` sent. Published: a ring
    all-reduce ``2 (h-1)/h * G`` per resident among its ``h`` hosts, then slices of ``G/N`` from the host that
    Algorithm 2 names. Bound: reduce-scatter ``(h-1)/h * G`` among the hosts, or their all-reduce.
    """
    size, num_ranks = model.grad_expert_bytes, residency.placement.num_ranks
    if state == DIRECT:
        return _to_all(residency, size / num_ranks)
    if state == PUBLISHED:
        return _ring(residency, 2 * size) + _collect_slices(residency, size / num_ranks)
    return _ring(residency, 2 * size if all_reduce else size)


def weight_flow(residency: Residency, model: ModelShape, state: str) -> Flow:
    """Weights from the optimizer state to where they are needed next.

    Direct: once per resident, ``residents * W * (N-1)/N`` received. Published: once per slot, ``(sN - s)/N * W`` on
    every rank. Bound: gathered among the hosts, ``(h-1)/h * W`` per resident.
    """
    size, placement = model.weight_expert_bytes, residency.placement
    if state == DIRECT:
        outwards = _to_all(residency, size / placement.num_ranks)
        return Flow(outwards.received_bytes, outwards.sent_bytes)
    if state == PUBLISHED:
        slots = placement.slots_per_rank
        per_rank = np.full(placement.num_ranks, slots * (placement.num_ranks - 1) / placement.num_ranks * size)
        return Flow(per_rank, per_rank)
    return _ring(residency, size)


def owned_params(residency: Residency, model: ModelShape, state: str) -> FloatArray:
    """``[N]`` expert parameters of one layer whose optimizer state sits on each rank."""
    placement = residency.placement
    if state in (DIRECT, PUBLISHED):
        return np.full(placement.num_ranks, placement.num_experts * model.expert_params / placement.num_ranks)
    return residency.sum_by_rank(model.expert_params / residency.num_hosts[residency.expert])


def _to_all(residency: Residency, slice_bytes: float) -> Flow:
    """Every resident sends one slice to every rank; the slice for the rank itself stays."""
    num_residents, num_ranks = residency.num_residents, residency.placement.num_ranks
    return Flow(num_residents * slice_bytes * (num_ranks - 1), (num_residents.sum() - num_residents) * slice_bytes)


def _ring(residency: Residency, size: float) -> Flow:
    """``(h-1)/h * size`` in and out for every resident with ``h`` hosts."""
    hosts = residency.num_hosts[residency.expert]
    per_rank = residency.sum_by_rank((hosts - 1) / hosts * size)
    return Flow(per_rank, per_rank)


def _collect_slices(residency: Residency, slice_bytes: float) -> Flow:
    """SwiftMoE, Algorithm 2: a rank that does not host an expert asks sorted host number ``rank % hosts``."""
    num_ranks = residency.placement.num_ranks
    hosts = residency.num_hosts[residency.expert]
    asking = (num_ranks - residency.host_index + hosts - 1) // hosts
    # Hosts themselves would ask by the same rule, but have the slice.
    first = np.arange(hosts.size) - residency.host_index
    asked_by_hosts = np.bincount(first + residency.rank % hosts, minlength=hosts.size)
    sent = residency.sum_by_rank((asking - asked_by_hosts) * slice_bytes)
    received = (residency.placement.num_experts - residency.num_residents) * slice_bytes
    return Flow(sent, received)


@dataclass(frozen=True, eq=False)
class Migration:
    """State that a bound system moves when its placement changes.

    Args:
        state: optimizer state.
        weights: weights for new hosts.
    """

    state: Flow
    weights: Flow


def migration_flow(before: Placement, after: Placement, model: ModelShape, whole: bool) -> Migration:
    """What moves from one placement to the next when state is bound to the hosts.

    Args:
        before: in force until now.
        after: in force from now on.
        model: sizes.
        whole: every new host gets the expert's whole optimizer state, as FlexMoE's cost model counts; else only the
            intervals of ``BoundShards`` that change owner move.
    """
    num_params, num_ranks = model.expert_params, before.num_ranks
    copies = weight_plan(WeightReplicas(num_params, before), WeightReplicas(num_params, after))
    weights = _flow(*moved_elements(copies, num_ranks), model.weight_bytes)
    if whole:
        return Migration(_flow(*moved_elements(copies, num_ranks), model.state_bytes), weights)
    here, there = BoundShards(num_params, before), BoundShards(num_params, after)
    plan = transfer_plan(here, there, changed_experts(before, after))
    return Migration(_flow(*moved_elements(plan, num_ranks), model.state_bytes), weights)


def _flow(sent: IntArray, received: IntArray, element_bytes: int) -> Flow:
    return Flow(sent * float(element_bytes), received * float(element_bytes))
