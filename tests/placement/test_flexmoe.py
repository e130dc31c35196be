"""FlexMoE's scheduler: moves by hand, its trigger, and that it never makes the modelled step dearer."""

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import Placement, next_placement, uniform
from lightning_swiftmoe.placement.flexmoe import FlexMoECosts, FlexMoEPolicy

TOKENS_ONLY = FlexMoECosts()


def slowest(placement, loads, costs=TOKENS_ONLY):
    """Plain restatement of the cost: slowest rank over its tokens, and one sync per resident that is shared."""
    worst = 0.0
    for rank, row in enumerate(placement.table.tolist()):
        seconds = sum(loads[e] / placement.replicas[e] * (costs.token_s + 4 * costs.token_exchange_s) for e in row)
        shared = [e for e in set(row) if placement.hosts(e).size > 1]
        worst = max(worst, seconds + costs.sync_s * len(shared))
        assert rank < placement.num_ranks
    return worst


def test_moves_by_hand():
    # Two replicas each: caps 40, 10, 5, 5 and ranks 50, 10, 50, 10.
    # 1. Expert 2 (cap 5, lowest index) gives its slot on rank 1 to expert 0: ranks 36.7, 31.7, 36.7, 15. Cheaper: kept.
    # 2. Expert 3 gives its slot on rank 3, the idler of its two: ranks 30, 30, 30, 30. Cheaper: kept.
    # 3. Expert 1, the last with two, would give its slot on rank 0: 32 there. Dearer: undone, the end.
    cluster = ClusterShape(4, 2, 4)
    start = uniform(cluster)
    assert start.table.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    after = FlexMoEPolicy()(np.array([80, 20, 10, 10]), cluster, start)
    assert after.table.tolist() == [[0, 1], [0, 3], [0, 1], [2, 0]]


def test_trigger():
    cluster = ClusterShape(4, 2, 4)
    start, loads = uniform(cluster), np.array([13, 10, 10, 10])  # rank loads 11.5, 10, 11.5, 10: max/mean 1.07
    assert FlexMoEPolicy(threshold=1.1)(loads, cluster, start) is start
    assert FlexMoEPolicy()(np.zeros(4, dtype=int), cluster, start) is start
    assert FlexMoEPolicy()(np.full(4, 10), cluster, start) is start


def test_no_replica_to_give():
    cluster = ClusterShape(2, 2, 4)
    start = uniform(cluster)
    assert FlexMoEPolicy()(np.array([100, 1, 1, 1]), cluster, start) is start


@pytest.mark.parametrize("costs", [TOKENS_ONLY, FlexMoECosts(1.0, 0.5, 3.0)])
@pytest.mark.parametrize("shape", [(4, 2, 4), (4, 4, 8), (16, 4, 16), (3, 3, 5)])
def test_never_dearer_and_always_valid(shape, costs):
    rng = np.random.default_rng(shape[0])
    cluster = ClusterShape(*shape)
    placement = uniform(cluster)
    policy = FlexMoEPolicy(costs=costs)
    for _ in range(15):
        loads = rng.integers(0, 1000, shape[2])
        after = next_placement(policy, loads, cluster, placement)
        assert after == policy(loads.copy(), cluster, placement)
        assert slowest(after, loads, costs) <= slowest(placement, loads, costs) + 1e-9
        placement = after


def test_sync_cost_brings_replicas_together():
    cluster = ClusterShape(4, 2, 4)
    loads = np.array([80, 10, 10, 10])
    apart = FlexMoEPolicy(costs=FlexMoECosts(1.0, 0.0, 0.0))(loads, cluster, uniform(cluster))
    together = FlexMoEPolicy(costs=FlexMoECosts(1.0, 0.0, 30.0))(loads, cluster, uniform(cluster))

    def shared(placement: Placement) -> int:
        return sum(placement.hosts(e).size for e in range(4) if placement.hosts(e).size > 1)

    assert shared(together) <= shared(apart)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"cannot be below 1, got 0\.5"):
        FlexMoEPolicy(threshold=0.5)
    with pytest.raises(ValueError, match="sync_s must not be negative"):
        FlexMoECosts(sync_s=-1.0)
