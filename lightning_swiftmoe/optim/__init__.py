"""Sharded experts: reduce gradients to shards, step, send weights."""

from lightning_swiftmoe.optim.bound import BoundExperts
from lightning_swiftmoe.optim.clip import clip_grad_norm
from lightning_swiftmoe.optim.groups import canonical_state, check_optimizers, insert_shards, load_canonical_state
from lightning_swiftmoe.optim.hosted import HostedExperts
from lightning_swiftmoe.optim.shards import ShardedExperts

__all__ = [
    "BoundExperts",
    "HostedExperts",
    "ShardedExperts",
    "canonical_state",
    "check_optimizers",
    "clip_grad_norm",
    "insert_shards",
    "load_canonical_state",
]
