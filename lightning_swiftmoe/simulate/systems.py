"""What is compared: a placement policy, how often it runs, and where the optimizer state lives."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import Placement, PlacementPolicy, get_policy, policy_names
from lightning_swiftmoe.placement.exact_split import exact_split
from lightning_swiftmoe.placement.flexmoe import FlexMoEPolicy
from lightning_swiftmoe.placement.greedy import greedy_replicas, pack_heaviest_first
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.placement.transient_copies import PooledSplit, WithCopies, with_copies
from lightning_swiftmoe.simulate.with_homes import llep, ultraep

# Where gradients meet the optimizer state.
DIRECT = "direct"  # ours: one all-to-all from the residents to N even shards, weights once per resident
PUBLISHED = "published"  # SwiftMoE as printed: all-reduce among the hosts, then collect slices; weights once per slot
BOUND = "bound"  # state on the hosts: all-reduce among them, weights gathered among them; it moves with the experts


@dataclass(frozen=True)
class System:
    """One row of a comparison.

    Args:
        name: as the user wrote it.
        policy: decides placements.
        every_n_steps: how often, from the loads added up since the last decision.
        state: ``DIRECT``, ``PUBLISHED`` or ``BOUND``.
        sees_current_load: the placement of a step comes from the very load of that step (simulation only).
        split: of an expert's assignments over its hosts and copies, where the slots of a rank share their capacity.
            None: evenly over its replicas, each slot with its own capacity.
        homes: every expert has one host for good, whatever slots a rank has; copies come on top.
        fetches: how often a step sends the weights of a copy: 2 where the backward fetches them again.
    """

    name: str
    policy: PlacementPolicy
    every_n_steps: int = 1
    state: str = DIRECT
    sees_current_load: bool = False
    split: PooledSplit | None = None
    homes: bool = False
    fetches: int = 1

    @property
    def decides(self) -> bool:
        """Whether placements ever change."""
        return not self.homes and self.name != "static"

    def cluster(self, whole: ClusterShape) -> ClusterShape:
        """What placements fill: all slots of ``whole``, or one home for every expert.

        Raises:
            ValueError: ranks would have different numbers of homes.
        """
        if not self.homes:
            return whole
        if whole.num_experts % whole.num_ranks:
            raise ValueError(
                f"{self.name} needs as many experts at home on every rank, got {whole.num_experts} experts on "
                f"{whole.num_ranks} ranks: choose a multiple of {whole.num_ranks} experts, or leave {self.name} out"
            )
        return replace(whole, slots_per_rank=whole.num_experts // whole.num_ranks)


@dataclass(frozen=True)
class ExactSplit:
    """As evenly over the ranks as the placement and the copies allow.

    Args:
        copies: transient ones on a rank, at most.
    """

    copies: int = 0

    def __call__(self, load: IntArray, placement: Placement) -> WithCopies:
        """The split of ``load [E]``."""
        return with_copies(exact_split(load, placement), placement, self.copies)


@dataclass(frozen=True)
class Oracle:
    """The best answer to a known load: the most survivors under a capacity, the most even ranks without one.

    Args:
        slot_capacity: assignments per slot; 0 means that nothing is dropped.
    """

    slot_capacity: int

    def __call__(self, loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
        """The placement for exactly these loads."""
        if loads.sum() == 0:
            return previous
        if not self.slot_capacity:
            counts = greedy_replicas(loads, cluster)
            return Placement(pack_heaviest_first(loads, counts, cluster), cluster.num_experts)
        return Placement.contiguous(surviving_replicas(loads, cluster, self.slot_capacity), cluster.slots_per_rank)


def surviving_replicas(loads: IntArray, cluster: ClusterShape, slot_capacity: int) -> IntArray:
    """``[E]`` replica counts that keep the most assignments: ``sum_e min(load_e, slot_capacity * r_e)`` is largest.

    A slot more for an expert keeps ``slot_capacity`` more assignments as long as that many are left, then the rest,
    then none; the gains only fall, so taking the largest ones is optimal. Slots that keep nothing go to the largest
    load per replica.
    """
    counts = np.ones(cluster.num_experts, dtype=np.int64)
    spare = cluster.num_slots - cluster.num_experts
    full_gains = np.maximum(loads // slot_capacity - 1, 0)
    granted = np.minimum(np.cumsum(full_gains), spare)
    counts += np.diff(granted, prepend=0)
    spare -= int(granted[-1])
    rest = np.maximum(loads - slot_capacity * counts, 0)
    last = np.argsort(-rest, kind="stable")[:spare]
    last = last[rest[last] > 0]
    counts[last] += 1
    for _ in range(spare - last.size):
        counts[np.argmax(loads / counts)] += 1
    return counts


def resolve_system(name: str, slot_capacity: int) -> System:
    """The system of that name.

    ``static``, ``flexmoe`` (its own trigger), ``flexmoe_N`` (forced every N steps): state bound to the hosts.
    ``oracle``; ``swiftmoe_published`` (``proportional`` with the published exchange); ``exact`` (``balanced``, with an
    exact split over the hosts and the slots of a rank pooled); ``exact_copies`` (the same with two transient copies on
    a rank). ``ultraep``, ``llep``: one home for every expert, with its state, from which copies are lent for a step;
    a rank has as much room as that of the others, and its homes and copies share it. Else any registered policy.

    Raises:
        ValueError: no such system.
    """
    if name == "static":
        return System(name, get_policy(name), state=BOUND)
    if name == "flexmoe":
        # Tolerates a quarter: the FlexMoE paper does not print the threshold of its experiments.
        return System(name, FlexMoEPolicy(threshold=1.25), state=BOUND)
    if match := re.fullmatch(r"flexmoe_([1-9]\d*)", name):
        return System(name, FlexMoEPolicy(), every_n_steps=int(match[1]), state=BOUND)
    if name == "oracle":
        return System(name, Oracle(slot_capacity), sees_current_load=True)
    if name == "swiftmoe_published":
        return System(name, get_policy("proportional"), state=PUBLISHED)
    if name == "exact":
        return System(name, get_policy("balanced"), split=ExactSplit())
    if name == "exact_copies":
        return System(name, get_policy("balanced"), split=ExactSplit(copies=2))
    if name == "ultraep":
        # Slots for copies serve one layer after the other, so that a backward fetches again (README, "Interface").
        return System(name, get_policy("static"), state=BOUND, split=ultraep, homes=True, fetches=2)
    if name == "llep":
        # Autograd keeps the copies of all layers until the backward (WeightTransferAutograd in llep/gpt_oss_llep.py).
        return System(name, get_policy("static"), state=BOUND, split=llep, homes=True)
    if name not in policy_names():
        ours = {"exact", "exact_copies", "flexmoe", "flexmoe_N", "llep", "oracle", "swiftmoe_published", "ultraep"}
        there_are = sorted({*policy_names(), *ours})
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(there_are)}")
    return System(name, get_policy(name))
