"""Replays a load trace under several placement systems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.cluster import ClusterShape, resolve_group_size
from lightning_swiftmoe.placement import next_placement, slot_capacity, uniform
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.placement.residency import Residency
from lightning_swiftmoe.simulate.cost import COUNT_BYTES, PHASES, CostModel, uses_migration
from lightning_swiftmoe.simulate.hardware import Efficiency, Hardware
from lightning_swiftmoe.simulate.load_trace import LoadTrace
from lightning_swiftmoe.simulate.model import ModelShape
from lightning_swiftmoe.simulate.overlap import hidden_s
from lightning_swiftmoe.simulate.results import PolicyResult, Simulation, describe
from lightning_swiftmoe.simulate.systems import DIRECT, System, resolve_system
from lightning_swiftmoe.simulate.traffic import (
    Flow,
    Routed,
    copy_flow,
    gradient_flow,
    migration_flow,
    no_flow,
    route,
    route_pooled,
    weight_flow,
)

# Seconds and bytes sent by all ranks, by phase.
Costs = tuple[dict[str, float], dict[str, float]]
BYTE_PHASES = (
    "load",
    "dense",
    "dispatch",
    "combine",
    "backward",
    "transient_copies",
    "gradient",
    "weight",
    "migration",
)


@dataclass(frozen=True)
class Scenario:
    """Everything but the loads and the policies.

    Args:
        model: sizes; its number of experts and ``top_k`` must be the trace's.
        hardware: the cluster; its number of ranks is the simulation's.
        slots_per_rank: ``s``.
        capacity_factor: experts drop what is over this times their slots' fair share; None drops nothing.
        offload: optimizer state of the experts in host memory.
        published_baselines: bound systems all-reduce gradients and move whole optimizer states, as the papers
            describe; else they reduce-scatter and move only what changes owner, the best they could do.
        efficiency: reached parts of the data sheet.
        expert_parallel_size: ranks that share one set of experts, as for ``SwiftMoEStrategy``; None: all.

    Raises:
        ValueError: too few slots, a capacity factor that is not positive, or groups that do not divide the ranks or
            that nodes do not divide.
    """

    model: ModelShape
    hardware: Hardware
    slots_per_rank: int
    capacity_factor: float | None = 1.0
    offload: bool = False
    published_baselines: bool = False
    efficiency: Efficiency = field(default_factory=Efficiency)
    expert_parallel_size: int | None = None

    def __post_init__(self) -> None:
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor must be above zero, or null to drop nothing, got {self.capacity_factor}")
        size, node = self.cluster.num_ranks, self.hardware.gpus_per_node
        if size % node and node % size:
            raise ValueError(
                f"expert_parallel_size = {size} leaves groups that share nodes of {node} devices unevenly: choose a "
                "divisor or a multiple"
            )

    @property
    def cluster(self) -> ClusterShape:
        """The shape policies see: one expert group."""
        size = resolve_group_size(self.expert_parallel_size, self.hardware.num_ranks)
        return ClusterShape(size, self.slots_per_rank, self.model.num_experts, self.capacity_factor is not None)

    @property
    def num_groups(self) -> int:
        """Expert groups ``G``, each with a whole set of experts."""
        return self.hardware.num_ranks // self.cluster.num_ranks

    @property
    def replica_hardware(self) -> Hardware:
        """The machines of ranks that hold the same shards, one of each group."""
        inside = max(1, self.hardware.gpus_per_node // self.cluster.num_ranks)
        return replace(self.hardware, gpus_per_node=inside, num_nodes=self.num_groups // inside)


def simulate(trace: LoadTrace, scenario: Scenario, policies: Sequence[str | System]) -> Simulation:
    """Run every policy over the same trace.

    The placement of a step comes from the loads before it; the first one is uniform. ``oracle`` alone sees the loads
    of the step itself.

    Args:
        trace: loads; its ranks must be the cluster's, or 1. ``LoadTrace.spread`` makes one fit.
        scenario: model, cluster, capacity.
        policies: names (``resolve_system``), or systems of your own.

    Raises:
        ValueError: trace and scenario do not fit, an unknown policy, state bound to hosts in several groups, or ranks
            with different numbers of homes.
    """
    _check_fit(trace, scenario, policies)
    slots = scenario.cluster.num_slots
    routed = int(trace.counts[0, 0].sum(dtype=np.int64)) // scenario.num_groups
    capacity = 0 if scenario.capacity_factor is None else slot_capacity(scenario.capacity_factor, routed, slots)
    systems = [p if isinstance(p, System) else resolve_system(p, capacity) for p in policies]
    if scenario.num_groups > 1 and (bound := [system.name for system in systems if uses_migration(system.state)]):
        raise ValueError(
            f"expert_parallel_size = {scenario.expert_parallel_size} needs state that is cut evenly over a group, but "
            f"{', '.join(bound)} binds it to the hosts: leave it out, or simulate one group of all ranks"
        )
    for system in systems:
        system.cluster(scenario.cluster)  # refuses what does not fit before anything runs
    loads = trace.counts.sum(axis=2, dtype=np.int64)
    results = {system.name: _Replay(trace, scenario, system, capacity).run() for system in systems}
    settings = {"trace": trace.name, "slot_capacity": capacity, **describe(scenario)}
    return Simulation(results, np.asarray(trace.steps), loads, settings)


def _check_fit(trace: LoadTrace, scenario: Scenario, policies: Sequence[str | System]) -> None:
    model, num_ranks = scenario.model, scenario.hardware.num_ranks
    if trace.num_experts != model.num_experts:
        raise ValueError(
            f"the trace routes to {trace.num_experts} experts, the model has {model.num_experts}; set model.num_experts"
        )
    if trace.top_k != model.top_k:
        raise ValueError(f"the trace has top_k={trace.top_k}, the model top_k={model.top_k}; set model.top_k")
    if trace.num_ranks not in (1, num_ranks):
        raise ValueError(
            f"the trace has {trace.num_ranks} ranks, the cluster {num_ranks}; choose a cluster of that size or "
            "spread=true to spread the loads evenly"
        )
    if not policies:
        raise ValueError("no policies to simulate; name at least one, such as policies=[static,proportional]")


class _Replay:
    """One system over one trace: the placements are its only state.

    Expert groups place and drop for themselves. A phase takes as long as in the slowest group.
    """

    def __init__(self, trace: LoadTrace, scenario: Scenario, system: System, capacity: int) -> None:
        self._trace, self._scenario, self._system, self._capacity = trace, scenario, system, capacity
        routed = float(trace.counts[0, 0].sum(dtype=np.int64))
        tokens_per_rank = routed / trace.top_k / scenario.hardware.num_ranks
        self._cost = CostModel(
            scenario.model, scenario.hardware, tokens_per_rank, scenario.offload, scenario.efficiency
        )
        inside = replace(self._cost, hardware=scenario.hardware.with_ranks(scenario.cluster.num_ranks))
        self._layers = [
            [_Layer(inside, scenario, system) for _ in range(scenario.num_groups)] for _ in range(trace.num_layers)
        ]
        self._between_groups = self._cost_between_groups()
        shape = (trace.num_steps, trace.num_layers)
        self._s = {phase: np.zeros(shape) for phase in PHASES}
        self._bytes = {phase: np.zeros(shape) for phase in BYTE_PHASES}
        self._kept, self._routed = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._imbalance, self._imbalance_after = np.ones(shape), np.ones(shape)
        self._moved = np.zeros(shape, dtype=np.int64)
        self._replicas = np.zeros((*shape, trace.num_experts), dtype=np.int64)
        self._rank_load = np.zeros((trace.num_layers, scenario.hardware.num_ranks))

    def run(self) -> PolicyResult:
        for step in range(self._trace.num_steps):
            for layer in range(self._trace.num_layers):
                self._run_layer(step, layer)
        return self._result()

    def _run_layer(self, step: int, layer: int) -> None:
        states, at = self._layers[layer], (step, layer)
        counts = _by_group(self._trace.counts[step, layer], len(states))
        loads = [part.sum(axis=0, dtype=np.int64) for part in counts]
        if self._system.sees_current_load:
            for state, load in zip(states, loads, strict=True):
                state.decide(load)
        routed = [state.route(part, self._capacity) for part, state in zip(counts, states, strict=True)]
        offered_load = np.concatenate([part.offered_load for part in routed])
        rank_load = np.concatenate([part.rank_load for part in routed])
        self._kept[at], self._routed[at] = sum(part.kept.sum() for part in routed), sum(load.sum() for load in loads)
        self._imbalance[at] = offered_load.max() / offered_load.mean()
        if rank_load.any():
            self._imbalance_after[at] = rank_load.max() / rank_load.mean()
        self._replicas[at], self._rank_load[layer] = sum(state.placement.replicas for state in states), rank_load
        self._charge(_together([state.step_costs(part) for state, part in zip(states, routed, strict=True)]), at)
        self._charge(self._between_groups, at)
        if not self._system.sees_current_load:
            for state, load in zip(states, loads, strict=True):
                state.accumulated += load
            if (step + 1) % self._system.every_n_steps == 0:
                decided = [state.decide(state.accumulated) for state in states]
                self._moved[at] = sum(moved for moved, _ in decided)
                self._charge(_together([costs for _, costs in decided]), at)
                for state in states:
                    state.accumulated[:] = 0
        # Weights go out to the next placement.
        self._charge(_together([state.update_costs() for state in states]), at)

    def _cost_between_groups(self) -> Costs:
        """Ranks that hold the same shards add up their gradients, and what each expert drew, in ring all-reduces."""
        scenario = self._scenario
        if scenario.num_groups == 1:
            return {}, {}
        cost = replace(self._cost, hardware=scenario.replica_hardware)
        owned = scenario.model.num_experts * scenario.model.expert_params / scenario.cluster.num_ranks
        sent = {
            "gradient": cost.all_reduce_bytes(owned * scenario.model.grad_bytes),
            "load": cost.all_reduce_bytes(scenario.model.num_experts * COUNT_BYTES),
        }
        seconds = {phase: cost.network_s(value, scenario.efficiency.all_reduce) for phase, value in sent.items()}
        return seconds, {phase: value * scenario.hardware.num_ranks for phase, value in sent.items()}

    def _charge(self, costs: Costs, at: tuple[int, int]) -> None:
        for phase, value in costs[0].items():
            self._s[phase][at] += value
        for phase, value in costs[1].items():
            self._bytes[phase][at] += value

    def _result(self) -> PolicyResult:
        seconds = {phase: values.sum(axis=1) for phase, values in self._s.items()}
        sent = {phase: values.sum(axis=1) for phase, values in self._bytes.items()}
        seconds["dense"] = np.full(self._trace.num_steps, self._cost.dense_s())
        num_ranks = self._scenario.hardware.num_ranks
        sent["dense"] = np.full(self._trace.num_steps, num_ranks * self._cost.dense_bytes(num_ranks))
        return PolicyResult(
            policy=self._system.name,
            survival=self._kept.sum(axis=1) / self._routed.sum(axis=1),
            rank_imbalance=self._imbalance.mean(axis=1),
            rank_imbalance_after_drops=self._imbalance_after.mean(axis=1),
            phase_s=seconds,
            phase_bytes=sent,
            hidden_s=self._hidden_s(),
            moved_residents=self._moved.sum(axis=1),
            mean_survival=int(self._kept.sum()) / int(self._routed.sum()),
            # fsum rounds once, so the mean does not depend on the order of addition.
            mean_rank_imbalance=math.fsum(self._imbalance.ravel()) / self._imbalance.size,
            replicas=self._replicas,
            rank_load=self._rank_load,
        )

    def _hidden_s(self) -> NDArray[np.float64]:
        if self._system.state != DIRECT or self._scenario.offload:
            return np.zeros(self._trace.num_steps)
        forward_s = self._cost.dense_forward_s() / self._trace.num_layers + self._s["experts"]
        return hidden_s(forward_s, 2 * forward_s, self._s["weight"], self._s["gradient"])


def _by_group(counts: IntArray, num_groups: int) -> list[IntArray]:
    """Each group's ``[N, E]`` of ``counts [G * N, E]``; of sums ``[1, E]`` an even share, ``[1, E]``."""
    if num_groups > 1 and len(counts) == 1:
        return [(counts + index) // num_groups for index in range(num_groups)]
    return np.split(counts, num_groups)


def _together(costs: Sequence[Costs]) -> Costs:
    """Of groups that work side by side: the slowest one's seconds, everybody's bytes."""
    if len(costs) == 1:
        return costs[0]
    seconds: dict[str, float] = {}
    sent: dict[str, float] = {}
    for group_seconds, group_sent in costs:
        for phase, value in group_seconds.items():
            seconds[phase] = max(seconds.get(phase, 0.0), value)
        for phase, value in group_sent.items():
            sent[phase] = sent.get(phase, 0.0) + value
    return seconds, sent


class _Layer:
    """The placement of one layer in one expert group, and what it costs."""

    def __init__(self, cost: CostModel, scenario: Scenario, system: System) -> None:
        self._cost, self._scenario, self._system = cost, scenario, system
        self._cluster = system.cluster(scenario.cluster)
        self.placement = uniform(self._cluster)
        self.residency = Residency.of(self.placement)
        self.accumulated: IntArray = np.zeros(scenario.model.num_experts, dtype=np.int64)
        # Costs change with the placement only: kept until gradients leave from, or weights go to, other hosts.
        self._gradient, self._gradient_of = self._gradient_flow(), self.residency
        self._update, self._update_of = self._new_update(), (self.residency, self.residency)

    def decide(self, loads: IntArray) -> tuple[int, Costs]:
        """Choose the next placement: residents that reached a new rank, and the cost of deciding and migrating."""
        before, cluster = self.placement, self._cluster
        after = next_placement(self._system.policy, loads, cluster, before)
        seconds = {"placement": self._cost.placement_s(cluster.num_slots)} if self._system.decides else {}
        if after is before or after == before:
            return 0, (seconds, {})
        residency = Residency.of(after)
        moved = _num_moved(self.residency, residency)
        sent: dict[str, float] = {}
        if uses_migration(self._system.state):
            flow = migration_flow(before, after, self._cost.model, self._scenario.published_baselines)
            seconds["migration"] = self._cost.migration_s(flow)
            sent["migration"] = flow.state.total_bytes + flow.weights.total_bytes
        self.placement, self.residency = after, residency
        return moved, (seconds, sent)

    def route(self, counts: IntArray, slot_capacity: int) -> Routed:
        """Under the placement in force; a rank's room is that of the scenario's slots, whoever fills how many."""
        split = self._system.split
        if split is None:
            return route(counts, self.residency, slot_capacity)
        return route_pooled(counts, self.placement, slot_capacity * self._scenario.slots_per_rank, split)

    def step_costs(self, routed: Routed) -> Costs:
        """Counts, dispatch to combine, and the gradient flow, which all use the placement in force."""
        num_ranks, size = self._scenario.cluster.num_ranks, self._cost.model.token_bytes
        exchanged = float(routed.sent.sum()) * size
        load_bytes = self._cost.load_bytes(num_ranks)
        if self._gradient_of is not self.residency:
            self._gradient, self._gradient_of = self._gradient_flow(), self.residency
        copies = copy_flow(routed.copies, self._cost.model, self._system.fetches)
        seconds = {
            "load": self._cost.network_s(load_bytes),
            **self._cost.routing_s(routed, self.residency),
            "transient_copies": self._cost.copies_s(copies),
        }
        sent = {
            "load": load_bytes * num_ranks,
            "dispatch": exchanged,
            "combine": exchanged,
            "backward": 2 * exchanged,
            "transient_copies": copies.total_bytes,
            "gradient": self._gradient.total_bytes,
        }
        return seconds, sent

    def update_costs(self) -> Costs:
        """Gradients from the old hosts, the optimizer, weights to the new hosts."""
        source, target = self._update_of
        if source is not self._gradient_of or target is not self.residency:
            self._update, self._update_of = self._new_update(), (self._gradient_of, self.residency)
        return self._update

    def _new_update(self) -> Costs:
        state = self._system.state
        weight = weight_flow(self.residency, self._cost.model, state)
        seconds = self._cost.update_s(self._gradient, weight, self.residency, state)
        return seconds, {"weight": weight.total_bytes}

    def _gradient_flow(self) -> Flow:
        if self._scenario.cluster.num_ranks == 1:
            return no_flow(1)
        published = self._scenario.published_baselines
        return gradient_flow(self.residency, self._cost.model, self._system.state, published)


def _num_moved(before: Residency, after: Residency) -> int:
    """Pairs of ``after`` that are not in ``before``; ``Placement.moved_from`` without the ``[N, E]`` tables."""
    num_ranks = before.placement.num_ranks
    old, new = before.expert * num_ranks + before.rank, after.expert * num_ranks + after.rank
    found = np.minimum(np.searchsorted(old, new), old.size - 1)
    return int((old[found] != new).sum())
