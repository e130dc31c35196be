"""Seconds from bytes and FLOPs. Nothing overlaps here: ``overlap.py`` says what of it our runtime hides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lightning_swiftmoe.placement.residency import Residency
from lightning_swiftmoe.simulate.hardware import Coefficient, Efficiency, Hardware
from lightning_swiftmoe.simulate.model import ModelShape
from lightning_swiftmoe.simulate.systems import BOUND
from lightning_swiftmoe.simulate.traffic import CopyFlow, Flow, Migration, Routed, owned_params

# In the order of a step. ``backward`` holds dispatch, experts and combine on the way back; ``dense`` everything outside
# the experts, its gradient all-reduce and optimizer included.
PHASES = (
    "load",
    "dense",
    "dispatch",
    "experts",
    "combine",
    "backward",
    "transient_copies",
    "gradient",
    "optimizer",
    "weight",
    "placement",
    "migration",
)
# One count on the wire, as the exchange sends it.
COUNT_BYTES = 8
# Adam reads gradient, master copy and two moments, and writes back the last three and the weights: 4*4 + 3*4 + 2.
_ADAM_BYTES = 30


@dataclass(frozen=True)
class CostModel:
    """Time of each phase on the slowest rank.

    Args:
        model: sizes.
        hardware: data sheet.
        tokens_per_rank: tokens of one rank and step.
        offload: optimizer state of the experts in host memory, reached over PCIe.
        efficiency: which part of the data sheet is reached; every coefficient names its source.
    """

    model: ModelShape
    hardware: Hardware
    tokens_per_rank: float
    offload: bool = False
    efficiency: Efficiency = field(default_factory=Efficiency)

    @cached_property
    def _flops_per_s(self) -> float:
        return self.hardware.peak_tflops_bf16 * 1e12 * self.efficiency.compute.value

    @cached_property
    def _hbm_Bps(self) -> float:
        return self.hardware.hbm_GBps * 1e9 * self.efficiency.memory.value

    def network_s(self, busiest_bytes: float, efficiency: Coefficient | None = None) -> float:
        """One exchange in which the busiest rank moves this many bytes, one after the other.

        Partners are taken to be spread evenly: ``(g-1)/(N-1)`` of the bytes stay in a node of ``g`` devices and use
        NVLink, the rest the NIC, both at once. Latency: one message per level of a binary tree.
        """
        num_ranks, inside = self.hardware.num_ranks, self.hardware.gpus_per_node - 1
        if num_ranks == 1:
            return 0.0
        local_bytes = busiest_bytes * inside / (num_ranks - 1)
        reached = (efficiency or self.efficiency.network).value
        nic_Bps = self.hardware.nic_Gbps * 1e9 / 8 * reached
        nvlink_Bps = self.hardware.nvlink_GBps * 1e9 * reached
        local_s = local_bytes / nvlink_Bps if local_bytes else 0.0
        latency_s = self.hardware.nic_latency_us * 1e-6 * math.ceil(math.log2(num_ranks))
        return max(local_s, (busiest_bytes - local_bytes) / nic_Bps) + latency_s

    def flow_s(self, flow: Flow) -> float:
        """One exchange, as far as its two directions overlap."""
        return self.network_s(flow.busiest_bytes(self.efficiency.duplex.value))

    def host_link_s(self, num_bytes: float) -> float:
        """Between host and device memory, one direction."""
        return num_bytes / (self.hardware.pcie_GBps * 1e9 * self.efficiency.pcie.value)

    def load_bytes(self, num_ranks: int) -> float:
        """Sent by one rank: its ``E`` counts to every other."""
        return float((num_ranks - 1) * self.model.num_experts * COUNT_BYTES)

    def dense_bytes(self, num_ranks: int) -> float:
        """Sent by one rank: ring all-reduce of the dense gradients, ``2 (N-1)/N * bytes`` (Patarasuk & Yuan, 2009)."""
        return 2 * (num_ranks - 1) / num_ranks * self.model.dense_params * self.model.grad_bytes

    def all_reduce_bytes(self, num_bytes: float) -> float:
        """Sent by one rank in a ring all-reduce of so many bytes over all ranks of ``hardware``."""
        return 2 * (self.hardware.num_ranks - 1) / self.hardware.num_ranks * num_bytes

    def dense_forward_s(self) -> float:
        """Computing outside of experts, forward alone."""
        return self.model.dense_flops_per_token * self.tokens_per_rank / self._flops_per_s

    def dense_s(self) -> float:
        """Per step: forward and twice that backward, the all-reduce, and Adam in device memory."""
        compute_s = 3 * self.dense_forward_s()
        adam_s = self.model.dense_params * _ADAM_BYTES / self._hbm_Bps
        num_bytes = self.dense_bytes(self.hardware.num_ranks)
        return compute_s + self.network_s(num_bytes, self.efficiency.all_reduce) + adam_s

    def experts_s(self, routed: Routed, residency: Residency) -> float:
        """Forward of one layer on the slowest rank: FLOPs, or reading each expert's weights if that takes longer."""
        compute_s = routed.rank_load * self.model.expert_flops_per_token / self._flops_per_s
        num_experts = residency.num_residents + routed.copies.fetched
        read_s = num_experts * self.model.weight_expert_bytes / self._hbm_Bps
        return float(np.maximum(compute_s, read_s).max())

    def routing_s(self, routed: Routed, residency: Residency) -> dict[str, float]:
        """Dispatch, experts, combine and backward of one layer."""
        size = self.model.token_bytes
        exchange_s = self.flow_s(Flow(routed.sent * size, routed.received * size))
        experts_s = self.experts_s(routed, residency)
        return {
            "dispatch": exchange_s,
            "experts": experts_s,
            "combine": exchange_s,
            "backward": 2 * exchange_s + 2 * experts_s,
        }

    def copies_s(self, flow: CopyFlow) -> float:
        """Transient copies of one layer, as if nothing hid them."""
        if not flow.weights.total_bytes:
            return 0.0
        return flow.fetches * self.flow_s(flow.weights) + self.flow_s(flow.gradients)

    def update_s(self, gradient: Flow, weight: Flow, residency: Residency, state: str) -> dict[str, float]:
        """Gradient, optimizer and weight phase of one layer. Offloaded shards cross PCIe in both transfer phases."""
        owned = float(owned_params(residency, self.model, state).max())
        down_s = self.host_link_s(owned * self.model.grad_bytes) if self.offload else 0.0
        up_s = self.host_link_s(owned * self.model.weight_bytes) if self.offload else 0.0
        if self.offload:
            adam_s = owned / self.efficiency.host_adam_params_per_s.value
        else:
            adam_s = owned * _ADAM_BYTES / self._hbm_Bps
        return {
            "gradient": self.flow_s(gradient) + down_s,
            "optimizer": adam_s,
            "weight": self.flow_s(weight) + up_s,
        }

    def placement_s(self, num_slots: int) -> float:
        """One run of the policy for one layer."""
        return self.efficiency.policy_fixed_s.value + num_slots * self.efficiency.policy_slot_s.value

    def migration_s(self, migration: Migration) -> float:
        """Optimizer state and weights to their new hosts; offloaded state crosses PCIe on both sides."""
        total_s = self.flow_s(migration.state + migration.weights)
        if self.offload:
            total_s += self.host_link_s(float(migration.state.sent_bytes.max()))
            total_s += self.host_link_s(float(migration.state.received_bytes.max()))
        return total_s


def uses_migration(state: str) -> bool:
    """Only state that is bound to hosts ever moves."""
    return state == BOUND
