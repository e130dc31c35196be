"""Closed formulas of the SwiftMoE paper (arXiv 2504.19925v1) and the numbers it printed. B/s and bytes throughout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseFormula:
    """Time of one phase (gradients in, or weights out) of one layer on one rank (SwiftMoE, section 4).

    Args:
        num_experts: ``E``.
        num_ranks: ``N``.
        slots_per_rank: ``s``.
        expert_bytes: ``G`` or ``W``, the bytes of one expert.
        pci_Bps: host link, bytes/s; ``inf`` when the optimizer state is in device memory.
        net_Bps: network, bytes/s.
    """

    num_experts: int
    num_ranks: int
    slots_per_rank: int
    expert_bytes: float
    pci_Bps: float
    net_Bps: float

    @property
    def swiftmoe_s(self) -> float:
        """``E/N * X/BW_pci + (sN - s)/N * X/BW_net``."""
        slots = self.slots_per_rank * self.num_ranks
        return self._host_s + (slots - self.slots_per_rank) / self.num_ranks * self.expert_bytes / self.net_Bps

    @property
    def static_s(self) -> float:
        """``E/N * X/BW_pci + (sN - E)/N * X/BW_net``."""
        slots = self.slots_per_rank * self.num_ranks
        return self._host_s + (slots - self.num_experts) / self.num_ranks * self.expert_bytes / self.net_Bps

    @property
    def increase(self) -> float:
        """``(E - s) / (sN - E (1 - BW_net/BW_pci))``: how much longer SwiftMoE takes, as a fraction."""
        slots = self.slots_per_rank * self.num_ranks
        return (self.num_experts - self.slots_per_rank) / (slots - self.num_experts * (1 - self.net_Bps / self.pci_Bps))

    @property
    def _host_s(self) -> float:
        return self.num_experts / self.num_ranks * self.expert_bytes / self.pci_Bps


def worked_example(pci_GBps: float = 64.0) -> PhaseFormula:
    """A GPT-3-sized MoE: G = W = 3.375 GB, E = 64, N = 2,048, s = 2, 400 Gb/s (SwiftMoE, section 4).

    ``increase`` is 1.52 %, and 1.54 % with ``pci_GBps=inf``. A gradient and a weight phase together take 0.273 s,
    static replication 0.269 s.
    """
    return PhaseFormula(64, 2048, 2, 3.375e9, pci_GBps * 1e9, 400e9 / 8)


def grouped_network_s(replicas: Sequence[int], num_groups: int, formula: PhaseFormula) -> float:
    """Network time of the hottest group when group ``g`` of ``N/k`` ranks keeps the state of experts ``g, g+k, ...``.

    The group sends ``sum(replicas of its experts) * X`` over ``N/k`` ranks. Their mean over groups is ``s * X`` per
    rank, what all N ranks together pay, so the largest is never less: splitting the optimizer never helps.

    Args:
        replicas: ``[E]`` replica counts.
        num_groups: ``k``; 1 is SwiftMoE.
        formula: sizes and bandwidths.

    Raises:
        ValueError: groups of unequal size.
    """
    if formula.num_ranks % num_groups:
        raise ValueError(f"{formula.num_ranks} ranks cannot form {num_groups} equal groups; use a divisor")
    ranks_per_group = formula.num_ranks // num_groups
    hottest = max(sum(replicas[g::num_groups]) for g in range(num_groups))
    return hottest * formula.expert_bytes / ranks_per_group / formula.net_Bps


# SwiftMoE, Table 3: minutes to loss 4.0 and the steps it needed fewer of, GPT-Small.
PUBLISHED_MINUTES = {
    "static": 147.84,
    "flexmoe_100": 145.42,
    "flexmoe_50": 141.60,
    "flexmoe_10": 138.61,
    "proportional": 102.68,
}
PUBLISHED_FEWER_STEPS = {"static": 0.285, "flexmoe_100": 0.156, "flexmoe_50": 0.121, "flexmoe_10": 0.0}
PUBLISHED_FEWER_DROPS = {"static": 0.69, "flexmoe_100": 0.64, "flexmoe_50": 0.62, "flexmoe_10": 0.43}
# SwiftMoE, Table 1: GPT-Small, 32 experts, 16 GPUs: capacity factor -> tokens kept, steps to the loss, ms of a forward.
PUBLISHED_CAPACITY = {1.0: (0.449, 618, 455.0), 2.0: (0.656, 527, 507.0), 4.0: (0.749, 478, 571.0)}
# SwiftMoE, Fig. 11: dropped at every coefficient of the auxiliary loss, about.
PUBLISHED_DROPPED = {"static": 0.40, "proportional": 0.10}
# SwiftMoE, Fig. 12: step time against DeepSpeed.
PUBLISHED_STEP_CHANGE = {"gpt-small": -0.028, "gpt-medium": -0.032, "gpt-large": -0.093}
PUBLISHED_NEW_PARTS_SHARE = {"gpt-small": 0.0106, "gpt-medium": 0.0082, "gpt-large": 0.0070}
# SwiftMoE, section 5.3: a FlexMoE rebalancing step against an ordinary one.
PUBLISHED_REBALANCE_RATIO = (2.46, 4.10)


def implied_step_ratio(system: str) -> float:
    """A system's mean step time over SwiftMoE's, as Table 3 implies: minutes over minutes, steps over steps.

    Example: FlexMoE-10 needed as many steps as SwiftMoE and 1.35 times the minutes.
    """
    return PUBLISHED_MINUTES[system] / PUBLISHED_MINUTES["proportional"] * (1 - PUBLISHED_FEWER_STEPS[system])
