"""Copies against a linear program over every choice of them, and what must hold of any."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import Placement, TokenRule, with_chosen_copies
from lightning_swiftmoe.placement.exact_split import exact_split
from lightning_swiftmoe.placement.transient_copies import LEAST_COPIED, with_copies
from tests.placement.test_exact_split import SHAPES, cases, smallest_largest_rank


def check(hosted, found, placement, most):
    hosts = placement.multiplicity > 0
    assert (found.hosted >= 0).all()
    assert (found.hosted.sum(axis=0) == hosted.sum(axis=0)).all()
    assert not found.hosted[~hosts & ~found.copied].any()
    assert not (found.copied & hosts).any()
    assert (found.hosted[found.copied] > 0).all()
    assert (found.copied.sum(axis=1) <= most).all()
    mean = -(-int(hosted.sum()) // placement.num_ranks)
    rank_load, before = found.hosted.sum(axis=1), hosted.sum(axis=1)
    assert (rank_load <= np.maximum(before, mean)).all()
    borrows = found.copied.any(axis=1)
    assert (before[borrows] < mean).all()
    return rank_load.max() / max(mean, 1)


@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_comes(shape, most):
    """Loads of ``cases``: as placed, drifted, one expert alone, none."""
    worst = []
    for load, placement in cases(shape):
        hosted = exact_split(load, placement)
        found = with_copies(hosted, placement, most, least_part=None)
        worst.append(check(hosted, found, placement, most))
        if most == 0:
            assert (found.hosted == hosted).all()
    if most == 2:
        assert np.quantile(worst, 0.9) < 1.01


def test_a_copy_takes_over_enough():
    """One that would take over less than asked for is not made, whatever the mean."""
    kept, all_of_them = [], 0
    for load, placement in cases(SHAPES[0]):
        hosted = exact_split(load, placement)
        found = with_copies(hosted, placement, 2, least_copied=300)
        check(hosted, found, placement, 2)
        kept += found.hosted[found.copied].tolist()
        all_of_them += int(with_copies(hosted, placement, 2).copied.sum())
    assert 0 < len(kept) < all_of_them
    assert min(kept) >= 300


@pytest.mark.parametrize(
    ("shapes", "most"),
    [
        ([(2, 8, 8)], 0),  # every rank may hold all
        ([(1, 8, 8)], 0),
        ([(2, 4, 8)], 1),
        ([(8, 16, 128)], 2),
        ([(2, 4, 4), (2, 4, 8)], 1),
        ([], 0),
    ],
)
def test_auto_leaves_room_where_experts_are_missing(shapes, most):
    rule = TokenRule()
    chosen, line = with_chosen_copies(rule, [ClusterShape(*shape) for shape in shapes])
    assert chosen == (replace(rule, transient_copies=most, least_copied=LEAST_COPIED) if most else rule)
    wanted = {0: "is off: every rank has a slot for every expert", 1: "may borrow an expert", 2: "up to 2 experts"}
    assert wanted[most] in line
    assert with_chosen_copies(rule, [ClusterShape(2, 4, 8)], "no") == (rule, "transient_copies='auto' is off: no")


def test_one_expert_alone_is_everywhere():
    placement = Placement(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), 8)
    hosted = exact_split(np.array([0, 0, 0, 82, 0, 0, 0, 0]), placement)
    found = with_copies(hosted, placement, 1)
    assert found.hosted[:, 3].tolist() == [21, 21, 21, 19]  # the mean of 20.5, rounded up
    assert found.copied[:, 3].tolist() == [True, False, True, True]


def test_by_hand():
    """Ranks 0 and 1 lend 30 of expert 0 and 10 of expert 2; rank 2 lacks 25 and rank 3 lacks 15."""
    placement = Placement(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), 8)
    hosted = exact_split(np.array([50, 20, 30, 20, 10, 5, 15, 10]), placement)
    assert hosted.sum(axis=1).tolist() == [70, 50, 15, 25]
    found = with_copies(hosted, placement, 1, least_part=None)
    # Rank 2 takes 25 of expert 0; rank 3 would take 5 of it and 10 of expert 2, and may only have the larger.
    assert found.hosted[2].tolist() == [25, 0, 0, 0, 10, 5, 0, 0]
    assert found.hosted[3].tolist() == [0, 0, 10, 0, 0, 0, 15, 10]
    assert with_copies(hosted, placement, 2, least_part=8).hosted.sum(axis=1).tolist() == [40, 40, 40, 40]
    assert with_copies(hosted, placement, 2, least_part=7).hosted[3].tolist() == [0, 0, 10, 0, 0, 0, 15, 10]


def test_where_nobody_has_room_for_a_copy_nothing_changes():
    placement = Placement(np.array([[0, 1], [1, 2], [2, 0]]), 3)
    hosted = np.array([[60, 45, 0], [0, 55, 46], [0, 0, 94]])
    found = with_copies(hosted, placement, 2)  # rank 2 lacks 6 to the mean of 100, and takes 5 and 1 of expert 1
    assert found.hosted[:, 1].tolist() == [40, 54, 6]
    assert found.copied.sum() == 1
    hosted[2, 2] += 2  # and now 5 to 101
    assert (with_copies(hosted, placement, 2).hosted == hosted).all()


@pytest.mark.parametrize("seed", range(8))
def test_near_the_best_choice_of_copies(seed):
    """Three ranks, four experts, one copy each: every choice is tried."""
    rng = np.random.default_rng(seed)
    placement = Placement(np.array([[0, 1], [2, 3], [1, 3]]), 4)
    load = rng.multinomial(3000, rng.dirichlet(np.full(4, 0.5)))
    hosted = exact_split(load, placement)
    found = with_copies(hosted, placement, 1, least_part=None)
    best = min(
        smallest_largest_rank(load, Placement(np.column_stack([placement.table, copies]), 4))
        for copies in product(range(4), repeat=3)
    )
    assert found.hosted.sum(axis=1).max() <= 1.02 * best + 1
