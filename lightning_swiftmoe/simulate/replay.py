"""Replays a load trace under several placement systems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import next_placement, slot_capacity, uniform
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.placement.residency import Residency
from lightning_swiftmoe.simulate.cost import PHASES, CostModel, uses_migration
from lightning_swiftmoe.simulate.hardware import Efficiency, Hardware
from lightning_swiftmoe.simulate.load_trace import LoadTrace
from lightning_swiftmoe.simulate.model import ModelShape
from lightning_swiftmoe.simulate.results import PolicyResult, Simulation, describe
from lightning_swiftmoe.simulate.systems import System, resolve_system
from lightning_swiftmoe.simulate.traffic import (
    Flow,
    Routed,
    gradient_flow,
    migration_flow,
    no_flow,
    route,
    weight_flow,
)

BYTE_PHASES = ("load", "dense", "dispatch", "combine", "backward", "gradient", "weight", "migration")


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

    Raises:
        ValueError: too few slots, or a capacity factor that is not positive.
    """

    model: ModelShape
    hardware: Hardware
    slots_per_rank: int
    capacity_factor: float | None = 1.0
    offload: bool = False
    published_baselines: bool = False
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor must be above zero, or null to drop nothing, got {self.capacity_factor}")
        _ = self.cluster

    @property
    def cluster(self) -> ClusterShape:
        """The shape policies see."""
        return ClusterShape(
            self.hardware.num_ranks, self.slots_per_rank, self.model.num_experts, self.capacity_factor is not None
        )


def simulate(trace: LoadTrace, scenario: Scenario, policies: Sequence[str | System]) -> Simulation:
    """Run every policy over the same trace.

    The placement of a step comes from the loads before it; the first one is uniform. ``oracle`` alone sees the loads
    of the step itself.

    Args:
        trace: loads; its ranks must be the cluster's, or 1. ``LoadTrace.spread`` makes one fit.
        scenario: model, cluster, capacity.
        policies: names (``resolve_system``), or systems of your own.

    Raises:
        ValueError: trace and scenario do not fit, or an unknown policy.
    """
    _check_fit(trace, scenario, policies)
    slots = scenario.cluster.num_slots
    routed = int(trace.counts[0, 0].sum(dtype=np.int64))
    capacity = 0 if scenario.capacity_factor is None else slot_capacity(scenario.capacity_factor, routed, slots)
    systems = [p if isinstance(p, System) else resolve_system(p, capacity) for p in policies]
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
    """One system over one trace: the placements are its only state."""

    def __init__(self, trace: LoadTrace, scenario: Scenario, system: System, capacity: int) -> None:
        self._trace, self._scenario, self._system, self._capacity = trace, scenario, system, capacity
        routed = float(trace.counts[0, 0].sum(dtype=np.int64))
        tokens_per_rank = routed / trace.top_k / scenario.hardware.num_ranks
        self._cost = CostModel(
            scenario.model, scenario.hardware, tokens_per_rank, scenario.offload, scenario.efficiency
        )
        self._layers = [_Layer(self._cost, scenario, system) for _ in range(trace.num_layers)]
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
        state, at = self._layers[layer], (step, layer)
        counts = self._trace.counts[step, layer]
        loads = counts.sum(axis=0, dtype=np.int64)
        if self._system.sees_current_load:
            state.decide(loads)
        routed = route(counts, state.residency, self._capacity)
        self._kept[at], self._routed[at] = routed.kept.sum(), loads.sum()
        self._imbalance[at] = routed.offered_load.max() / routed.offered_load.mean()
        if routed.rank_load.any():
            self._imbalance_after[at] = routed.rank_load.max() / routed.rank_load.mean()
        self._replicas[at], self._rank_load[layer] = state.placement.replicas, routed.rank_load
        self._charge(state.step_costs(routed), at)
        if not self._system.sees_current_load:
            state.accumulated += loads
            if (step + 1) % self._system.every_n_steps == 0:
                moved, costs = state.decide(state.accumulated)
                self._moved[at] = moved
                self._charge(costs, at)
                state.accumulated[:] = 0
        # Weights go out to the next placement.
        self._charge(state.update_costs(), at)

    def _charge(self, costs: tuple[dict[str, float], dict[str, float]], at: tuple[int, int]) -> None:
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
            moved_residents=self._moved.sum(axis=1),
            mean_survival=int(self._kept.sum()) / int(self._routed.sum()),
            # fsum rounds once, so the mean does not depend on the order of addition.
            mean_rank_imbalance=math.fsum(self._imbalance.ravel()) / self._imbalance.size,
            replicas=self._replicas,
            rank_load=self._rank_load,
        )


class _Layer:
    """The placement of one layer, and what it costs."""

    def __init__(self, cost: CostModel, scenario: Scenario, system: System) -> None:
        self._cost, self._scenario, self._system = cost, scenario, system
        self.placement = uniform(scenario.cluster)
        self.residency = Residency.of(self.placement)
        self.accumulated: IntArray = np.zeros(scenario.model.num_experts, dtype=np.int64)
        # Costs change with the placement only: kept until gradients leave from, or weights go to, other hosts.
        self._gradient, self._gradient_of = self._gradient_flow(), self.residency
        self._update, self._update_of = self._new_update(), (self.residency, self.residency)

    def decide(self, loads: IntArray) -> tuple[int, tuple[dict[str, float], dict[str, float]]]:
        """Choose the next placement: residents that reached a new rank, and the cost of deciding and migrating."""
        before, cluster = self.placement, self._scenario.cluster
        after = next_placement(self._system.policy, loads, cluster, before)
        seconds = {"placement": self._cost.placement_s(cluster.num_slots)} if self._system.name != "static" else {}
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

    def step_costs(self, routed: Routed) -> tuple[dict[str, float], dict[str, float]]:
        """Counts, dispatch to combine, and the gradient flow, which all use the placement in force."""
        num_ranks, size = self._scenario.hardware.num_ranks, self._cost.model.token_bytes
        exchanged = float(routed.sent.sum()) * size
        load_bytes = self._cost.load_bytes(num_ranks)
        if self._gradient_of is not self.residency:
            self._gradient, self._gradient_of = self._gradient_flow(), self.residency
        seconds = {"load": self._cost.network_s(load_bytes), **self._cost.routing_s(routed, self.residency)}
        sent = {
            "load": load_bytes * num_ranks,
            "dispatch": exchanged,
            "combine": exchanged,
            "backward": 2 * exchanged,
            "gradient": self._gradient.total_bytes,
        }
        return seconds, sent

    def update_costs(self) -> tuple[dict[str, float], dict[str, float]]:
        """Gradients from the old hosts, the optimizer, weights to the new hosts."""
        source, target = self._update_of
        if source is not self._gradient_of or target is not self.residency:
            self._update, self._update_of = self._new_update(), (self._gradient_of, self.residency)
        return self._update

    def _new_update(self) -> tuple[dict[str, float], dict[str, float]]:
        state = self._system.state
        weight = weight_flow(self.residency, self._cost.model, state)
        seconds = self._cost.update_s(self._gradient, weight, self.residency, state)
        return seconds, {"weight": weight.total_bytes}

    def _gradient_flow(self) -> Flow:
        if self._scenario.hardware.num_ranks == 1:
            return no_flow(1)
        published = self._scenario.published_baselines
        return gradient_flow(self.residency, self._cost.model, self._system.state, published)


def _num_moved(before: Residency, after: Residency) -> int:
    """Pairs of ``after`` that are not in ``before``; ``Placement.moved_from`` without the ``[N, E]`` tables."""
    num_ranks = before.placement.num_ranks
    old, new = before.expert * num_ranks + before.rank, after.expert * num_ranks + after.rank
    found = np.minimum(np.searchsorted(old, new), old.size - 1)
    return int((old[found] != new).sum())
