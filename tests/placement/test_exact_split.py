"""The split over hosts against linear programs: the smallest largest rank, and the most that ranks with room keep."""

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import Placement, RandomPolicy, get_policy, host_share, uniform
from lightning_swiftmoe.placement.exact_split import exact_split, further, keep_within_ranks, poured, turns_of

# Ranks, slots of each, experts.
SHAPES = [(2, 2, 3), (4, 4, 8), (8, 6, 32), (16, 3, 32), (16, 4, 32), (3, 5, 5), (64, 8, 256)]


def cases(shape):
    """Loads that a placement was made for, and others: a step's drift, Zipf, one expert alone, none at all."""
    num_ranks, slots, experts = shape
    cluster = ClusterShape(num_ranks, slots, experts, False)
    rng = np.random.default_rng(sum(shape))
    zipf = 1 / np.arange(1, experts + 1)
    loads = [rng.multinomial(1000 * num_ranks, rng.permutation(zipf) / zipf.sum()) for _ in range(3)]
    drifted = [rng.poisson(load * rng.uniform(0.8, 1.25, experts)) for load in loads]
    one = np.bincount([experts // 2], minlength=experts) * 777
    for load, then in zip(loads, drifted, strict=True):
        for policy in (get_policy("balanced"), get_policy("proportional"), RandomPolicy(1)):
            placement = policy(load, cluster, uniform(cluster))
            for asked in (load, then, one, 0 * one):
                yield asked, placement


def pairs_of(placement):
    """Who hosts whom, and the matrices that sum pairs by expert and by rank."""
    ranks, experts = np.nonzero(placement.multiplicity)
    index = np.arange(ranks.size)
    by_expert = coo_matrix((np.ones(ranks.size), (experts, index)), (placement.num_experts, ranks.size))
    by_rank = coo_matrix((np.ones(ranks.size), (ranks, index)), (placement.num_ranks, ranks.size))
    return by_expert.tocsr(), by_rank.tocsr()


def smallest_largest_rank(load, placement):
    by_expert, by_rank = pairs_of(placement)
    num_ranks, num_pairs = by_rank.shape
    # The last variable is the largest rank.
    ranks = coo_matrix(np.hstack([by_rank.toarray(), -np.ones((num_ranks, 1))])).tocsr()
    experts = coo_matrix(np.hstack([by_expert.toarray(), np.zeros((len(load), 1))])).tocsr()
    costs = np.append(np.zeros(num_pairs), 1)
    return linprog(costs, A_ub=ranks, b_ub=np.zeros(num_ranks), A_eq=experts, b_eq=load, method="highs").fun


def most_kept(load, placement, room):
    by_expert, by_rank = pairs_of(placement)
    limits = [(by_expert, load), (by_rank, np.full(placement.num_ranks, room))]
    rows = coo_matrix(np.vstack([matrix.toarray() for matrix, _ in limits])).tocsr()
    bounds = np.concatenate([bound for _, bound in limits])
    return -linprog(-np.ones(by_rank.shape[1]), A_ub=rows, b_ub=bounds, method="highs").fun


@pytest.mark.parametrize("shape", SHAPES)
def test_the_busiest_rank_gets_the_least(shape):
    worst = 0.0
    for load, placement in cases(shape):
        split = exact_split(load, placement)
        assert (split >= 0).all()
        assert (split.sum(axis=0) == load).all()
        assert not split[placement.multiplicity == 0].any()
        best = smallest_largest_rank(load, placement)
        largest = split.sum(axis=1).max()
        assert largest >= best - 1e-6
        worst = max(worst, (largest - 1) / max(best, 1) - 1)  # whole assignments
    assert worst < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_with_room_keep_the_most(shape):
    for load, placement in cases(shape):
        room = -(-int(load.sum()) // placement.num_ranks)
        split = exact_split(load, placement)
        kept = keep_within_ranks(split, room)
        assert (kept >= 0).all()
        assert (kept <= split).all()
        assert kept.sum(axis=1).tolist() == np.minimum(split.sum(axis=1), room).tolist()
        assert kept.sum() >= most_kept(load, placement, room) - 0.002 * load.sum() - placement.num_ranks


def test_no_round_is_the_even_split():
    placement = Placement(np.array([[0, 1], [1, 1], [2, 0]]), 3)
    load = np.array([7, 9, 4])
    assert (exact_split(load, placement, rounds=0) == host_share(load, placement)).all()


def test_by_hand():
    """Rank 1 has expert 1 alone, and expert 0 has nowhere else to go: all of expert 1 goes there up to the level."""
    placement = Placement(np.array([[0, 1], [1, 1]]), 2)
    assert exact_split(np.array([6, 10]), placement).tolist() == [[6, 2], [0, 8]]


@pytest.mark.parametrize("amount", [0, 1, 5, 6, 37])
@pytest.mark.parametrize("levels", [[0], [3, 0, 9], [4, 4, 4], [0, 100], [7, 2, 2, 30]])
def test_poured_one_by_one(amount, levels):
    """Each into the lowest vessel: the heights are the same, in any order."""
    given = poured(amount, np.array(levels))
    assert given.sum() == amount
    assert (given >= 0).all()
    heights = list(levels)
    for _ in range(amount):
        heights[heights.index(min(heights))] += 1
    assert sorted(given + levels) == sorted(heights)


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_share_no_host(shape):
    """Every expert that has a choice is in one, and there are few of them: a rank's residents need one each."""
    for _, placement in cases(shape):
        groups = turns_of(placement)
        choices = [expert for expert in range(placement.num_experts) if placement.hosts(expert).size > 1]
        assert sorted(expert for group in groups for expert in group) == choices
        for group in groups:
            hosts = np.concatenate([placement.hosts(expert) for expert in group])
            assert np.unique(hosts).size == hosts.size
        assert len(groups) <= 2 * placement.num_residents.max()


def test_further_keeps_the_sum_and_stays_above_zero():
    """By hand: 10 leave the first for the others, and 4 more can; then only 3 are left, and none does."""
    assert further(np.array([20, 5, 5]), np.array([10, 12, 8])).tolist() == [6, 14, 10]
    assert further(np.array([13, 5, 5]), np.array([3, 12, 8])).tolist() == [3, 12, 8]
