"""Does it fit? Memory of one rank, and the fewest slots and ranks that hold a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lightning_swiftmoe.cluster import min_slots
from lightning_swiftmoe.simulate.generators import Workload, generate
from lightning_swiftmoe.simulate.hardware import Hardware
from lightning_swiftmoe.simulate.model import ModelShape
from lightning_swiftmoe.simulate.replay import Scenario, simulate
from lightning_swiftmoe.simulate.results import PolicyResult

# CUDA's context, NCCL's channels and loaded kernels, measured on two H200 (docs/results/olmoe.md).
RUNTIME_BYTES = 2 * 10**9
# Where ranks reach each other's memory, rows have five places that all layers share.
_ROW_BUFFERS = 5
# By NCCL they are sent, received, and received again on the way back.
_ROW_COPIES = 3
_FP32_BYTES = 4


@dataclass(frozen=True)
class Run:
    """What decides about memory besides sizes.

    Args:
        tokens_per_rank: of one forward on one rank.
        offload: shards and moments in host memory.
        dense: ``"ddp"`` or ``"fsdp2"``, as for ``SwiftMoEStrategy``.
        capacity_factor: None drops nothing.
        ranks_per_node: that reach each other's memory.
    """

    tokens_per_rank: float
    offload: bool = False
    dense: str = "ddp"
    capacity_factor: float | None = None
    ranks_per_node: int = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank; the busiest rank where they differ.

    Args:
        dense_bytes: weights, gradients and optimizer state outside the experts, and their copies in the dtype of
            matrix products.
        expert_weight_bytes: weights in the slots of all MoE layers.
        expert_grad_bytes: gradients of two layers' slots: others have left.
        shard_bytes: this rank's part of the experts' optimizer state: fp32 master copy and gradient.
        moment_bytes: this rank's part of the experts' two Adam moments.
        activation_bytes: of a forward, at its end.
        row_bytes: tokens on their way between ranks.
        shards_on_host: shards and moments are in host memory (offload).
    """

    dense_bytes: int
    expert_weight_bytes: int
    expert_grad_bytes: int
    shard_bytes: int
    moment_bytes: int
    activation_bytes: int
    row_bytes: int
    shards_on_host: bool = False

    @property
    def device_bytes(self) -> int:
        """In device memory together, with what the runtime itself needs.

        All at once: Lightning clears the gradients of a step behind the next forward.
        """
        on_device = self.dense_bytes + self.expert_weight_bytes + self.expert_grad_bytes
        on_device += self.activation_bytes + self.row_bytes + RUNTIME_BYTES
        return on_device if self.shards_on_host else on_device + self.shard_bytes + self.moment_bytes


def memory_per_rank(model: ModelShape, num_ranks: int, slots_per_rank: int, run: Run) -> MemoryPlan:
    """What one rank holds.

    Every slot may hold another expert, so weights and gradients count each slot. A shard is ``ceil(P/N)`` elements of
    every expert.

    Args:
        model: sizes.
        num_ranks: ``N``.
        slots_per_rank: ``s``.
        run: the rest.
    """
    slots = slots_per_rank * model.num_moe_layers
    owned = -(-model.expert_params // num_ranks) * model.num_experts * model.num_moe_layers
    moment_bytes = model.state_bytes // 2
    return MemoryPlan(
        dense_bytes=_dense_bytes(model, num_ranks, run.dense),
        expert_weight_bytes=slots * model.weight_expert_bytes,
        expert_grad_bytes=slots_per_rank * min(2, model.num_moe_layers) * model.grad_expert_bytes,
        shard_bytes=owned * (model.state_bytes - moment_bytes),
        moment_bytes=owned * moment_bytes,
        activation_bytes=model.activation_bytes(run.tokens_per_rank),
        row_bytes=_row_bytes(model, num_ranks, run),
        shards_on_host=run.offload,
    )


def _dense_bytes(model: ModelShape, num_ranks: int, dense: str) -> int:
    """Master weights, gradients and moments, and copies for matrix products; by DDP a bucket of gradients as well."""
    copies = model.dense_params * model.weight_bytes
    if dense == "ddp" or num_ranks == 1:
        return model.dense_params * (model.state_bytes + _FP32_BYTES) + copies
    # Embeddings are gathered for as long as a forward lasts, blocks one at a time, and the next is on its way.
    embeddings = min(2 * model.vocab_size * model.dim, model.dense_params)
    blocks = 2 * (model.dense_params - embeddings) // model.num_layers
    return -(-model.dense_params // num_ranks) * model.state_bytes + _FP32_BYTES * (embeddings + blocks) + copies


def _row_bytes(model: ModelShape, num_ranks: int, run: Run) -> int:
    share = run.tokens_per_rank * model.top_k
    if num_ranks == 1:
        return 0
    if num_ranks > run.ranks_per_node:
        return math.ceil(_ROW_COPIES * share * model.token_bytes)
    # Without a capacity one rank may get everything.
    rows = share * (num_ranks if run.capacity_factor is None else run.capacity_factor)
    return math.ceil(_ROW_BUFFERS * rows * model.token_bytes)


def smallest_ranks(model: ModelShape, hardware: Hardware, run: Run) -> int | None:
    """The fewest ranks, in whole nodes above one, that hold the model at the fewest slots; None if 65,536 do not."""
    sizes = [*range(1, hardware.gpus_per_node), *range(hardware.gpus_per_node, 65536 + 1, hardware.gpus_per_node)]
    for num_ranks in sizes:
        slots = min_slots(model.num_experts, num_ranks)
        plan = memory_per_rank(model, num_ranks, slots, run)
        if plan.device_bytes <= hardware.hbm_gb * 1e9:
            return num_ranks
    return None


def largest_slots(model: ModelShape, hardware: Hardware, run: Run) -> int | None:
    """The most slots per rank that fit, at most one per expert; None when not even the fewest do."""
    fits = [
        slots
        for slots in range(min_slots(model.num_experts, hardware.num_ranks), model.num_experts + 1)
        if memory_per_rank(model, hardware.num_ranks, slots, run).device_bytes <= hardware.hbm_gb * 1e9
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
