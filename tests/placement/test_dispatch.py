"""Token conservation: whatever the placement, every kept assignment is dispatched once and arrives once."""

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import (
    Placement,
    RandomPolicy,
    host_share,
    keep_within_capacity,
    plan_dispatch,
    slot_capacity,
    uniform,
)

SHAPES = [(1, 3, 3), (2, 2, 3), (3, 2, 5), (4, 3, 7), (5, 4, 4), (3, 7, 2)]


def random_case(num_ranks, slots, num_experts, seed):
    rng = np.random.default_rng(seed)
    shape = ClusterShape(num_ranks, slots, num_experts)
    counts = rng.integers(0, 50, size=(num_ranks, num_experts)) * rng.integers(0, 2, size=(num_ranks, num_experts))
    placement = RandomPolicy(seed)(counts.sum(0), shape, uniform(shape))
    return counts, placement


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_sent_is_received(shape, seed):
    counts, placement = random_case(*shape, seed)
    hosted = host_share(counts.sum(0), placement)
    plans = [plan_dispatch(counts, hosted, rank) for rank in range(shape[0])]
    for source, plan in enumerate(plans):
        assert (plan.send.sum(axis=0) == counts[source]).all()
        for host, other in enumerate(plans):
            assert (plan.send[host] == other.recv[source]).all()
    for host, plan in enumerate(plans):
        assert plan.recv.sum() == plan.rank_load[host]
        absent = placement.multiplicity[host] == 0
        assert plan.recv[:, absent].sum() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_replicas_share_evenly(shape):
    counts, placement = random_case(*shape, 11)
    share = host_share(counts.sum(0), placement)
    assert (share.sum(axis=0) == counts.sum(0)).all()
    fair = counts.sum(0) * placement.multiplicity / placement.replicas
    assert (np.abs(share - fair) < 1).all()


def test_own_tokens_stay_home():
    # Both ranks host both experts, so nothing needs to travel when both route the same load.
    placement = Placement(np.array([[0, 1], [0, 1]]), 2)
    counts = np.array([[4, 2], [4, 2]])
    plan = plan_dispatch(counts, host_share(counts.sum(0), placement), 1)
    assert plan.send.tolist() == [[0, 0], [4, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_capacity_keeps_exactly_min_of_load_and_capacity(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, size=(4, 6))
    capacity = rng.integers(0, 80, size=6)
    kept = keep_within_capacity(counts, capacity)
    assert (kept.sum(axis=0) == np.minimum(counts.sum(axis=0), capacity)).all()
    assert (kept >= 0).all()
    assert (kept <= counts).all()
    # No rank is served before another: shares differ from proportional by less than one assignment.
    fair = counts * np.minimum(1, capacity / np.maximum(counts.sum(0), 1))
    assert (np.abs(kept - fair) < 1).all()


@pytest.mark.parametrize(
    ("factor", "assignments", "slots", "expected"), [(1.0, 32768, 64, 512), (1.1, 100, 10, 11), (1.0, 10, 4, 3)]
)
def test_slot_capacity(factor, assignments, slots, expected):
    assert slot_capacity(factor, assignments, slots) == expected
