"""Every policy: each slot filled, each expert placed, the same answer twice, and the published counts."""

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape, min_slots, resolve_slots
from lightning_swiftmoe.placement import Placement, get_policy, next_placement, policy_names, register_policy, uniform
from lightning_swiftmoe.placement.policies import greedy_replicas, proportional_replicas

SHAPES = [(1, 3, 3), (1, 5, 3), (2, 2, 3), (3, 2, 5), (4, 3, 7), (5, 4, 4), (16, 4, 32), (7, 3, 2)]


def loads_of(kind, num_experts):
    rng = np.random.default_rng(num_experts)
    return {
        "zero": np.zeros(num_experts, dtype=np.int64),
        "one_hot": np.eye(num_experts, dtype=np.int64)[num_experts // 2] * 1000,
        "zipf": (10_000 / np.arange(1, num_experts + 1)).astype(np.int64),
        "random": rng.integers(0, 1000, num_experts),
    }[kind]


@pytest.mark.parametrize("name", ["auto", "static", "proportional", "balanced", "random"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["zero", "one_hot", "zipf", "random"])
def test_valid_and_deterministic(name, shape, kind):
    cluster = ClusterShape(*shape)
    loads = loads_of(kind, cluster.num_experts)
    first = next_placement(get_policy(name), loads, cluster, uniform(cluster))
    again = next_placement(get_policy(name), loads.copy(), cluster, uniform(cluster))
    assert first == again
    assert first.replicas.sum() == cluster.num_slots
    assert first.replicas.min() >= 1


def test_algorithm_1_by_hand():
    # goals 6.4, 1.2, 0.3, 0.1 of 8 slots -> floors 6, 1, 1, 1 = 9, one too many. The largest count - goal is the
    # last expert's 0.9, but it has one replica only; then 0.7, likewise; then -0.2 (expert 1, one replica), then
    # the -0.1 that the second 'lower diff' left behind, ..., until expert 0 gives one up.
    counts = proportional_replicas(np.array([640, 120, 30, 10]), ClusterShape(4, 2, 4))
    assert counts.tolist() == [5, 1, 1, 1]


def algorithm_1(loads, cluster):
    """As it is published: a search for every replica, also of experts that have one and keep it."""
    goal = loads / loads.sum() * cluster.num_slots
    counts = np.floor(np.maximum(goal, 1)).astype(np.int64)
    diff = counts - goal
    while counts.sum() > cluster.num_slots:
        e = int(np.argmax(diff))
        if counts[e] > 1:
            counts[e] -= 1
        diff[e] -= 1
    while counts.sum() < cluster.num_slots:
        e = int(np.argmin(diff))
        counts[e] += 1
        diff[e] += 1
    return counts


@pytest.mark.parametrize("largest", [3, 10**6])
@pytest.mark.parametrize("skew", [0, 1, 4])
def test_same_counts_as_algorithm_1(skew, largest):
    rng = np.random.default_rng(skew)
    for _ in range(400):
        num_ranks, slots = (int(x) for x in rng.integers(1, [20, 9]))
        cluster = ClusterShape(num_ranks, slots, int(rng.integers(1, num_ranks * slots + 1)))
        shares = rng.uniform(size=cluster.num_experts) ** skew
        loads = np.ceil(largest * shares).astype(np.int64) * rng.integers(0, 2, cluster.num_experts)
        loads[rng.integers(cluster.num_experts)] += 1
        counts = proportional_replicas(loads, cluster)
        assert counts.tolist() == algorithm_1(loads, cluster).tolist(), (cluster, loads)


def test_proportional_is_contiguous():
    cluster = ClusterShape(4, 2, 3)
    placement = get_policy("proportional")(np.array([500, 250, 250]), cluster, uniform(cluster))
    assert placement.table.tolist() == [[0, 0], [0, 0], [1, 1], [2, 2]]


def test_proportional_keeps_what_is_right_already():
    cluster, loads = ClusterShape(4, 2, 3), np.array([500, 250, 250])
    policy = get_policy("proportional")
    placement = policy(loads, cluster, uniform(cluster))
    assert policy(loads, cluster, placement) is placement
    turned = Placement(placement.table[::-1], 3)  # as many replicas of each expert
    assert policy(loads, cluster, turned) == placement


def test_greedy_counts_minimise_the_largest_share():
    loads, cluster = np.array([90, 50, 20, 10]), ClusterShape(4, 2, 4)
    counts = greedy_replicas(loads, cluster)
    best = min(
        max(90 / a, 50 / b, 20 / c, 10 / (8 - a - b - c))
        for a in range(1, 5)
        for b in range(1, 5)
        for c in range(1, 5)
        if 1 <= 8 - a - b - c <= 4
    )
    assert max(loads / counts) == pytest.approx(best)


def test_balanced_levels_ranks_better_than_contiguous():
    cluster = ClusterShape(16, 4, 32)
    loads = loads_of("zipf", 32)

    def imbalance(name):
        placement = get_policy(name)(loads, cluster, uniform(cluster))
        rank_load = placement.multiplicity @ (loads / placement.replicas)
        return rank_load.max() / rank_load.mean()

    assert imbalance("balanced") < 1.05 < imbalance("proportional") < imbalance("static")


def test_random_moves_every_step():
    cluster = ClusterShape(4, 2, 4)
    tables, placement = set(), uniform(cluster)
    for _ in range(10):
        placement = get_policy("random")(np.full(4, 7), cluster, placement)
        tables.add(placement)
    assert len(tables) == 10


def test_slots_errors_name_the_smallest_that_works():
    with pytest.raises(ValueError, match="smallest slots_per_rank that works is 3"):
        ClusterShape(3, 2, 7)
    with pytest.raises(ValueError, match='must be "auto" or a positive integer, got 0'):
        resolve_slots(0, 4, 2)
    assert min_slots(7, 3) == 3
    assert resolve_slots("auto", 16, 16) == 2
    assert resolve_slots("auto", 4, 1) == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1], [1, 1]], "these have none: \\[2\\]"),
        ([[0, 1], [2, 3]], "got \\[3\\]"),
        ([0, 1, 2], "table of expert numbers"),
        ([[0.5, 1], [2, 2]], "table of expert numbers"),
        ([], "table of expert numbers"),
    ],
)
def test_a_policy_that_returns_nonsense_is_named(table, message):
    cluster = ClusterShape(2, 2, 3)

    def broken(loads, shape, previous):
        return np.array(table)

    with pytest.raises(ValueError, match=f"'broken' returned an invalid placement: .*{message}"):
        next_placement(broken, np.ones(3, dtype=np.int64), cluster, uniform(cluster))


def test_a_policy_for_another_cluster_is_refused():
    cluster = ClusterShape(2, 2, 3)
    other = Placement(np.array([[0, 1, 2]]), 3)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) .* expected \(2, 2\)"):
        next_placement(lambda *_: other, np.ones(3, dtype=np.int64), cluster, uniform(cluster))


def test_registry():
    with pytest.raises(ValueError, match="unknown placement policy 'nope'; there are auto, balanced"):
        get_policy("nope")
    with pytest.raises(ValueError, match="exists already"):
        register_policy("static", lambda *_: None)
    with pytest.raises(TypeError, match="got 3"):
        register_policy("three", 3)
    assert "proportional" in policy_names()
