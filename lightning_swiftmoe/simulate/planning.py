"""Does it fit? Memory of one rank, and the fewest slots and ranks that hold a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lightning_swiftmoe.cluster import min_slots
from lightning_swiftmoe.simulate.generators import Workload, generate
from lightning_swiftmoe.simulate.hardware import Hardware
from lightning_swiftmoe.simulate.model import ModelShape
from lightning_swiftmoe.simulate.replay import Scenario, simulate
from lightning_swiftmoe.simulate.results import PolicyResult


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank; the busiest rank where they differ.

    Args:
        dense_bytes: weights, gradients and optimizer state outside the experts, on every rank (data parallel).
        expert_weight_bytes: weights in the slots of all MoE layers.
        expert_grad_bytes: gradients of the same.
        shard_bytes: this rank's part of the experts' optimizer state: fp32 master copy and gradient.
        moment_bytes: this rank's part of the experts' two Adam moments.
        activation_bytes: kept for backward, no recomputation.
        shards_on_host: shards and moments are in host memory (offload).
    """

    dense_bytes: int
    expert_weight_bytes: int
    expert_grad_bytes: int
    shard_bytes: int
    moment_bytes: int
    activation_bytes: int
    shards_on_host: bool = False

    @property
    def device_bytes(self) -> int:
        """In device memory together."""
        total = self.dense_bytes + self.expert_weight_bytes + self.expert_grad_bytes + self.activation_bytes
        return total if self.shards_on_host else total + self.shard_bytes + self.moment_bytes


def memory_per_rank(
    model: ModelShape, num_ranks: int, slots_per_rank: int, tokens_per_rank: float, offload: bool = False
) -> MemoryPlan:
    """What one rank holds.

    Every slot may hold another expert, so weights and gradients count each slot. A shard is ``ceil(P/N)`` elements of
    every expert.

    Args:
        model: sizes.
        num_ranks: ``N``.
        slots_per_rank: ``s``.
        tokens_per_rank: tokens of one forward on one rank.
        offload: shards and moments in host memory.
    """
    slots = slots_per_rank * model.num_moe_layers
    owned = -(-model.expert_params // num_ranks) * model.num_experts * model.num_moe_layers
    moment_bytes = model.state_bytes // 2
    return MemoryPlan(
        dense_bytes=model.dense_params * (model.weight_bytes + model.grad_bytes + model.state_bytes),
        expert_weight_bytes=slots * model.weight_expert_bytes,
        expert_grad_bytes=slots * model.grad_expert_bytes,
        shard_bytes=owned * (model.state_bytes - moment_bytes),
        moment_bytes=owned * moment_bytes,
        activation_bytes=model.activation_bytes(tokens_per_rank),
        shards_on_host=offload,
    )


def smallest_ranks(model: ModelShape, hardware: Hardware, tokens_per_rank: float, offload: bool = False) -> int | None:
    """The fewest ranks, in whole nodes above one, that hold the model at the fewest slots; None if 65,536 do not."""
    sizes = [*range(1, hardware.gpus_per_node), *range(hardware.gpus_per_node, 65536 + 1, hardware.gpus_per_node)]
    for num_ranks in sizes:
        slots = min_slots(model.num_experts, num_ranks)
        plan = memory_per_rank(model, num_ranks, slots, tokens_per_rank, offload)
        if plan.device_bytes <= hardware.hbm_gb * 1e9:
            return num_ranks
    return None


def largest_slots(model: ModelShape, hardware: Hardware, tokens_per_rank: float, offload: bool = False) -> int | None:
    """The most slots per rank that fit, at most one per expert; None when not even the fewest do."""
    fits = [
        slots
        for slots in range(min_slots(model.num_experts, hardware.num_ranks), model.num_experts + 1)
        if memory_per_rank(model, hardware.num_ranks, slots, tokens_per_rank, offload).device_bytes
        <= hardware.hbm_gb * 1e9
    ]
    return max(fits, default=None)


def modelled_step(scenario: Scenario, tokens_per_rank: int, skew: float = 1.0) -> dict[str, PolicyResult]:
    """One step of ``static`` and ``exact`` on Zipf loads of that skew, all MoE layers, in steady state."""
    model = scenario.model
    tokens = tokens_per_rank * scenario.hardware.num_ranks
    # Layers cost the same, so four different draws stand for all of them; two steps, so that placements have adapted.
    num_layers = min(model.num_moe_layers, 4)
    work = Workload(2, num_layers, model.num_experts, tokens, model.top_k, skew=skew)
    results = simulate(generate("zipf", work), scenario, ["static", "exact"]).results
    return {name: _last_step(result, model.num_moe_layers / num_layers) for name, result in results.items()}


def _last_step(result: PolicyResult, layers: float) -> PolicyResult:
    phase_s = {k: v[-1:] * (1.0 if k == "dense" else layers) for k, v in result.phase_s.items()}
    phase_bytes = {k: v[-1:] * (1.0 if k == "dense" else layers) for k, v in result.phase_bytes.items()}
    last = float(result.survival[-1])
    return dataclasses.replace(
        result,
        phase_s=phase_s,
        phase_bytes=phase_bytes,
        survival=result.survival[-1:],
        mean_survival=last,
        rank_imbalance=result.rank_imbalance[-1:],
        rank_imbalance_after_drops=result.rank_imbalance_after_drops[-1:],
    )
