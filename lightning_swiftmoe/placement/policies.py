"""Placement policies: pure functions from loads, cluster shape and the previous placement to the next placement.

Every rank computes the next placement on its own from the same global loads, so a policy must be deterministic:
no clock, no global random state, ties broken towards the lowest index.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.arguments import did_you_mean
from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement.greedy import FloatArray, greedy_replicas, pack_heaviest_first
from lightning_swiftmoe.placement.placement import IntArray, Placement


@runtime_checkable
class PlacementPolicy(Protocol):
    """Decides where experts go. A plain function with this signature is a policy."""

    def __call__(self, loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
        """Return the next placement.

        Args:
            loads: ``[E]`` assignments routed to each expert since the last decision, over all ranks, before drops.
                They may be all zero.
            cluster: counts of ranks, slots and experts.
            previous: the placement now in force.
        """
        ...


def static(loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
    """Never move: keep the uniform placement the layer started with."""
    return previous


def uniform(cluster: ClusterShape) -> Placement:
    """Equal replicas for every expert, give or take one: slot ``i`` of rank ``j`` holds expert ``(j*s + i) % E``."""
    slots = np.arange(cluster.num_slots) % cluster.num_experts
    return Placement(slots.reshape(cluster.num_ranks, cluster.slots_per_rank), cluster.num_experts)


def proportional(loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
    """Replicas in proportion to the load, laid out contiguously (SwiftMoE, Algorithm 1)."""
    if not np.count_nonzero(loads):
        return previous
    counts = proportional_replicas(loads, cluster)
    if previous.is_contiguous_with(counts, cluster.slots_per_rank):
        return previous
    return Placement.contiguous(counts, cluster.slots_per_rank)


def proportional_replicas(loads: IntArray, cluster: ClusterShape) -> IntArray:
    """``[E]`` replica counts of Algorithm 1 (arXiv 2504.19925, section 4): round the fair share, then repair the sum.

    The loads must not be all zero; ``ClusterShape`` guarantees ``N * s >= E``, without which the repair never ends.
    """
    goal = loads / loads.sum() * cluster.num_slots
    counts = np.maximum(goal, 1.0).astype(np.int64)
    diff = counts - goal
    missing = cluster.num_slots - int(counts.sum())
    if missing > 0:
        # Nobody gets two: a rounded count is short by less than one, so more experts than are missing are short.
        shortest = diff.argsort(kind="stable")[:missing]
        counts[shortest] += 1
    if missing < 0:
        _take_back(counts, diff, -missing)
    return counts


def _take_back(counts: IntArray, diff: FloatArray, surplus: int) -> None:
    """Lower ``counts [E]`` by ``surplus`` in all, each time where ``count - goal`` is largest, the lowest such expert.

    The algorithm also picks experts that have one replica and keep it; nobody else sees that, so they are left out.
    """
    givers = np.flatnonzero(counts > 1)
    heap = list(zip((-diff[givers]).tolist(), givers.tolist(), strict=True))
    heapq.heapify(heap)
    for _ in range(surplus):
        value, expert = heap[0]
        counts[expert] -= 1
        if counts[expert] > 1:
            heapq.heapreplace(heap, (value + 1, expert))
        else:
            heapq.heappop(heap)


def balanced(loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
    """Even out the ranks: greedy replica counts, then longest-processing-time packing.

    Counts as in EPLB (deepseek-ai/EPLB): the next replica goes to the expert with the largest load per replica.
    Packing: the heaviest replica goes to the least loaded rank with a free slot that does not host the expert yet.
    """
    if not np.count_nonzero(loads):
        return previous
    counts = greedy_replicas(loads, cluster)
    return Placement(pack_heaviest_first(loads, counts, cluster), cluster.num_experts)


@dataclass(frozen=True)
class RandomPolicy:
    """Any valid placement, a new one whenever the loads or the previous placement change.

    Training must not care where experts sit; this policy is how the tests ask.

    Args:
        seed: any integer; the placement is a pure function of it, the loads and the previous placement.
    """

    seed: int = 0

    def __call__(self, loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
        state = zlib.crc32(np.asarray(loads, dtype=np.int64).tobytes() + previous.table.tobytes())
        rng = np.random.default_rng([self.seed, state])
        extra = rng.integers(cluster.num_experts, size=cluster.num_slots - cluster.num_experts)
        slots = rng.permutation(np.concatenate([np.arange(cluster.num_experts), extra]))
        return Placement(slots.reshape(cluster.num_ranks, cluster.slots_per_rank), cluster.num_experts)


def auto(loads: IntArray, cluster: ClusterShape, previous: Placement) -> Placement:
    """``proportional`` where experts drop tokens, ``balanced`` where they do not.

    With a capacity a hot expert needs replicas wherever they are; without one only the load of the ranks counts.
    """
    policy = proportional if cluster.has_capacity else balanced
    return policy(loads, cluster, previous)


_POLICIES: dict[str, PlacementPolicy] = {}


def register_policy(name: str, policy: PlacementPolicy) -> None:
    """Make ``policy`` available by name, in Python and in configs.

    Raises:
        ValueError: the name is taken by another policy.
        TypeError: the policy cannot be called.
    """
    if not callable(policy):
        raise TypeError(f"a policy is a function (loads, cluster, previous) -> Placement, got {policy!r}")
    if _POLICIES.get(name, policy) is not policy:
        raise ValueError(f"a policy named {name!r} exists already; choose another name")
    _POLICIES[name] = policy


def policy_names() -> list[str]:
    """Names of all registered policies, sorted."""
    return sorted(_POLICIES)


def get_policy(policy: str | PlacementPolicy) -> PlacementPolicy:
    """The policy of that name, or the policy itself.

    Raises:
        ValueError: no policy of that name.
        TypeError: neither a name nor a function of three arguments.
    """
    if isinstance(policy, str):
        if policy not in _POLICIES:
            there_are = f"there are {', '.join(policy_names())}{did_you_mean(policy, policy_names())}"
            raise ValueError(f"unknown placement policy {policy!r}; {there_are}")
        return _POLICIES[policy]
    if not callable(policy):
        raise TypeError(
            f"policy must be a name ({', '.join(policy_names())}) or a function (loads, cluster, previous) -> "
            f"Placement, got {policy!r}"
        )
    _check_takes_three(policy)
    return policy


def try_policy(policy: PlacementPolicy, cluster: ClusterShape) -> None:
    """Ask a copy of ``policy`` once, for some loads, so that what it cannot answer is known before training.

    Raises:
        ValueError: what it returns is no placement for ``cluster``.
    """
    try:
        copied = deepcopy(policy)
    except Exception:
        return
    next_placement(copied, np.arange(1, cluster.num_experts + 1), cluster, uniform(cluster))


def _check_takes_three(policy: PlacementPolicy) -> None:
    try:
        takes = signature(policy)
    except ValueError:  # a function in C may have none
        return
    try:
        takes.bind(None, None, None)
    except TypeError as error:
        hint = " (an object of the class, not the class itself)" if isinstance(policy, type) else ""
        raise TypeError(
            f"policy {name_of(policy)!r} must be called with (loads, cluster, previous){hint}, but it takes {takes}"
        ) from error


def name_of(policy: Callable[..., Any]) -> str:
    """What errors call it."""
    return getattr(policy, "__name__", type(policy).__name__)


def next_placement(
    policy: Callable[[IntArray, ClusterShape, Placement], Placement | NDArray],
    loads: IntArray,
    cluster: ClusterShape,
    previous: Placement,
) -> Placement:
    """Run ``policy`` and check what it returns before anything is built on it.

    Raises:
        ValueError: loads that are not ``[E]`` counts, or a result that is no placement of this cluster's shape.
    """
    loads = np.asarray(loads)
    if loads.shape != (cluster.num_experts,) or np.count_nonzero(loads < 0):
        raise ValueError(f"loads must be {cluster.num_experts} counts, got {loads!r}")
    result = policy(loads, cluster, previous)
    name, expected = name_of(policy), (cluster.num_ranks, cluster.slots_per_rank)
    try:
        placement = result if isinstance(result, Placement) else Placement(result, cluster.num_experts)
    except ValueError as error:
        raise ValueError(
            f"placement policy {name!r} returned an invalid placement: {error}; return a Placement, or experts by "
            f"rank and slot, {expected} integers"
        ) from error
    if placement.table.shape != expected or placement.num_experts != cluster.num_experts:
        raise ValueError(
            f"placement policy {name!r} returned a table of shape {placement.table.shape} for {placement.num_experts} "
            f"experts, expected {expected} for {cluster.num_experts}"
        )
    return placement


register_policy("auto", auto)
register_policy("static", static)
register_policy("proportional", proportional)
register_policy("balanced", balanced)
register_policy("random", RandomPolicy())
