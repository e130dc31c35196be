"""What a placement says of its table, against loops over its slots."""

import numpy as np
import pytest

from lightning_swiftmoe.placement import Placement


def some_placement(rng, num_ranks, slots, num_experts):
    extra = rng.integers(num_experts, size=num_ranks * slots - num_experts)
    experts = rng.permutation(np.concatenate([np.arange(num_experts), extra]))
    return Placement(experts.reshape(num_ranks, slots), num_experts)


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 16, 16), (3, 2, 5), (8, 4, 7)])
def test_counts_of_slots(shape):
    rng = np.random.default_rng(0)
    num_experts = shape[-1]
    for _ in range(20):
        before, after = some_placement(rng, *shape), some_placement(rng, *shape)
        multiplicity = [[row.count(e) for e in range(num_experts)] for row in after.table.tolist()]
        assert after.multiplicity.tolist() == multiplicity
        assert after.replicas.tolist() == np.sum(multiplicity, axis=0).tolist()
        new = [set(a) - set(b) for a, b in zip(after.table.tolist(), before.table.tolist(), strict=True)]
        assert after.moved_from(before) == sum(len(experts) for experts in new)


def test_contiguous_with():
    placement = Placement.contiguous([1, 3, 2, 2], 4)
    assert placement.is_contiguous_with(placement.replicas, 4)
    assert not placement.is_contiguous_with(np.array([2, 2, 2, 2]), 4)
    assert not placement.is_contiguous_with(placement.replicas, 2)  # the same slots on other ranks
    assert not Placement(placement.table[::-1], 4).is_contiguous_with(placement.replicas, 4)


def test_a_placement_is_a_value():
    given = np.array([[0, 1], [1, 1]])
    placement = Placement(given, 2)
    given[0, 0] = 1
    assert placement.table.tolist() == [[0, 1], [1, 1]]
    assert placement == Placement(np.array([[0.0, 1], [1, 1]]), 2)
    for array in (placement.table, placement.replicas, placement.multiplicity):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
