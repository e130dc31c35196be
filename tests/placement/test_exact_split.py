"""The split over hosts against linear programs: the smallest largest rank, and the most that ranks with room keep."""

import highspy
import numpy as np
import pytest

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


class SplitProgram:
    """A linear program with a variable for every pair of a rank and an expert that it hosts."""

    def __init__(self, placement):
        self.solver = highspy.Highs()
        self.solver.silent()
        ranks, experts = np.nonzero(placement.multiplicity)
        pairs = np.array([self.solver.addVariable() for _ in ranks])
        self.of_expert = [pairs[experts == expert] for expert in range(placement.num_experts)]
        self.of_rank = [pairs[ranks == rank] for rank in range(placement.num_ranks)]

    def add(self, *constraints):
        for constraint in constraints:
            self.solver.addConstr(constraint)

    def optimum(self):
        assert self.solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return self.solver.getObjectiveValue()


def total(pairs):
    return sum(pairs[1:], start=1 * pairs[0])


def smallest_largest_rank(load, placement):
    program = SplitProgram(placement)
    largest = program.solver.addVariable()
    program.add(*(total(pairs) == int(amount) for pairs, amount in zip(program.of_expert, load, strict=True)))
    program.add(*(total(pairs) <= largest for pairs in program.of_rank))
    program.solver.minimize(largest)
    return program.optimum()


def most_kept(load, placement, room):
    program = SplitProgram(placement)
    program.add(*(total(pairs) <= int(amount) for pairs, amount in zip(program.of_expert, load, strict=True)))
    program.add(*(total(pairs) <= room for pairs in program.of_rank))
    program.solver.maximize(total(np.concatenate(program.of_rank)))
    return program.optimum()


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
        most = most_kept(load, placement, room)
        assert most - 0.002 * load.sum() - placement.num_ranks <= kept.sum() <= most + 1e-6


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
