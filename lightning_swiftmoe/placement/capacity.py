"""How many assignments an expert may process, and which ranks' assignments are kept."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from lightning_swiftmoe.arguments import check_choice
from lightning_swiftmoe.placement.placement import IntArray

# What a rank seldom exceeds, of what it would process if all had the same: the exact split leaves the busiest less than
# 1 % above the mean (docs/decisions/0019-exact-split.md). Memory that every layer has for itself is for no more.
USUAL_LOAD = 1.1

CapacityScope = Literal["cluster", "rank", "pooled"]
"""What has room for how much: ``"cluster"`` an expert, by its replicas (SwiftMoE); ``"rank"`` an expert, by what each
rank routes (DeepSpeed); ``"pooled"`` a rank, by its slots."""


def check_scope(scope: str) -> None:
    """Raise a ValueError for a scope that does not exist."""
    check_choice("capacity_scope", scope, get_args(CapacityScope))


def slot_capacity(capacity_factor: float, num_assignments: int, num_slots: int) -> int:
    """Assignments one slot may process: ``ceil(capacity_factor * tokens * top_k / (N * s))`` (SwiftMoE, section 3).

    Args:
        capacity_factor: 1.0 gives every slot exactly its fair share.
        num_assignments: ``tokens * top_k`` of the global batch.
        num_slots: ``N * s``.
    """
    # Rounded first: 1.1 * 100 / 10 is 11.000000000000002, and nobody means 12 by that.
    return math.ceil(round(capacity_factor * num_assignments / num_slots, 6))


def keep_within_capacity(counts: IntArray, capacity: IntArray) -> IntArray:
    """``[N, E]`` assignments that rank ``j`` may keep of expert ``e``.

    An expert over its capacity keeps exactly ``capacity[e]`` assignments, shared out over the ranks in
    proportion to what they routed (cumulative rounding, so the shares add up). Each rank keeps its first ones in
    batch order.

    Args:
        counts: ``[N, E]`` assignments routed by each rank.
        capacity: ``[E]`` most assignments of each expert, ``slot_capacity * replicas``.
    """
    load = counts.sum(axis=0)
    cap = np.minimum(capacity, load)
    upper = np.cumsum(counts, axis=0) * cap // np.maximum(load, 1)
    return np.diff(upper, axis=0, prepend=0)
