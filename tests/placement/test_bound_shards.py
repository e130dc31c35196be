"""State bound to hosts and plans between shard maps: hand-worked intervals, and every element exactly once."""

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import EvenShards, Placement, RandomPolicy, uniform
from lightning_swiftmoe.placement.bound_shards import BoundShards
from lightning_swiftmoe.placement.transfer import (
    EvenMap,
    Transfer,
    WeightReplicas,
    changed_experts,
    moved_elements,
    transfer_plan,
    weight_plan,
)


def random_placements(shape, count=6):
    cluster = ClusterShape(*shape)
    return [RandomPolicy(seed)(np.arange(shape[2]), cluster, uniform(cluster)) for seed in range(count)]


def test_intervals_by_hand():
    placement = Placement(np.array([[0, 0], [0, 1], [2, 2], [2, 2], [1, 1], [1, 2]]), 3)
    shards = BoundShards(10, placement)
    assert shards.intervals(0) == [(0, 0, 5), (1, 5, 10)]
    assert shards.intervals(1) == [(1, 0, 4), (4, 4, 8), (5, 8, 10)]
    # More hosts than elements: the last own nothing.
    assert BoundShards(2, placement).intervals(1) == [(1, 0, 1), (4, 1, 2)]


def test_plan_by_hand():
    before = Placement(np.array([[0], [0], [1]]), 2)
    after = Placement(np.array([[0], [0], [0], [1]])[[0, 1, 3]], 2)
    assert changed_experts(before, after) == []
    wide = Placement(np.array([[0, 0], [0, 0], [1, 0]]), 2)
    old = Placement(np.array([[0, 0], [0, 0], [1, 1]]), 2)
    plan = transfer_plan(BoundShards(6, old), BoundShards(6, wide), [0])
    assert plan == (
        Transfer(0, 0, 0, 0, 2),
        Transfer(0, 1, 0, 2, 3),
        Transfer(1, 1, 0, 3, 4),
        Transfer(1, 2, 0, 4, 6),
    )
    sent, received = moved_elements(plan, 3)
    assert sent.tolist() == [1, 2, 0]
    assert received.tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_elements", [1, 7, 60])
@pytest.mark.parametrize("shape", [(3, 2, 4), (5, 3, 6), (2, 4, 3)])
def test_every_element_once_from_its_owner(shape, num_elements):
    maps = [BoundShards(num_elements, p) for p in random_placements(shape)]
    maps.append(EvenMap(EvenShards(num_elements, 1, shape[0])))
    for here in maps:
        for there in maps:
            owner, target = (np.full((shape[2], num_elements), -1) for _ in range(2))
            for e in range(shape[2]):
                for rank, start, stop in here.intervals(e):
                    owner[e, start:stop] = rank
                for rank, start, stop in there.intervals(e):
                    target[e, start:stop] = rank
            covered = np.zeros((shape[2], num_elements), dtype=int)
            plan = transfer_plan(here, there, range(shape[2]))
            for t in plan:
                covered[t.expert, t.start : t.stop] += 1
                assert (owner[t.expert, t.start : t.stop] == t.src).all()
                assert (target[t.expert, t.start : t.stop] == t.dst).all()
            assert (covered == 1).all()
            sent, received = moved_elements(plan, shape[0])
            assert sent.sum() == received.sum() == (owner != target).sum()


def test_even_shards_never_move():
    shards = EvenShards(17, 1, 4)
    even = EvenMap(shards)
    assert [i[1:] for i in even.intervals(0)] == [shards.interval(r) for r in range(4)]
    assert moved_elements(transfer_plan(even, even, range(3)), 4)[0].sum() == 0


def test_weights_reach_every_new_host_once():
    for before in random_placements((4, 3, 5)):
        for after in random_placements((4, 3, 5)):
            plan = weight_plan(WeightReplicas(9, before), WeightReplicas(9, after))
            assert len(plan) == after.moved_from(before)
            for t in plan:
                assert before.multiplicity[t.src, t.expert] > 0
                assert before.multiplicity[t.dst, t.expert] == 0
                assert after.multiplicity[t.dst, t.expert] > 0
                assert (t.start, t.stop) == (0, 9)


def test_maps_of_different_parameters_are_refused():
    placement = uniform(ClusterShape(2, 1, 2))
    with pytest.raises(ValueError, match="got 4 and 5 elements"):
        transfer_plan(BoundShards(4, placement), BoundShards(5, placement), [0])
