"""Where experts sit: placements, policies, capacities, dispatch plans, shard maps. Integers, no communication."""

from lightning_swiftmoe.placement.capacity import CapacityScope, keep_within_capacity, slot_capacity
from lightning_swiftmoe.placement.dispatch import DispatchPlan, host_share, plan_dispatch
from lightning_swiftmoe.placement.placement import Placement
from lightning_swiftmoe.placement.policies import (
    PlacementPolicy,
    RandomPolicy,
    get_policy,
    next_placement,
    policy_names,
    register_policy,
    try_policy,
    uniform,
)
from lightning_swiftmoe.placement.shards import EvenShards
from lightning_swiftmoe.placement.token_rule import Shares, Split, TokenRule, token_rule, with_chosen_copies

__all__ = [
    "CapacityScope",
    "DispatchPlan",
    "EvenShards",
    "Placement",
    "PlacementPolicy",
    "RandomPolicy",
    "Shares",
    "Split",
    "TokenRule",
    "get_policy",
    "host_share",
    "keep_within_capacity",
    "next_placement",
    "plan_dispatch",
    "policy_names",
    "register_policy",
    "slot_capacity",
    "token_rule",
    "try_policy",
    "uniform",
    "with_chosen_copies",
]
