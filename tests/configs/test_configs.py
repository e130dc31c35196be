"""A few random configurations on every number of ranks, and what the comparison itself must see."""

import copy

import numpy as np
import pytest

from tests.configs.compare import faults_of, on_ranks
from tests.configs.configuration import Configuration, drawn

pytestmark = pytest.mark.distributed

COUNT = 20


def test_the_same_seed_draws_the_same():
    first = drawn(COUNT, 0)
    assert len(first) == COUNT
    assert drawn(COUNT, 0) == first
    assert drawn(COUNT, 1) != first


def test_a_line_makes_the_configuration_again():
    for configuration in drawn(COUNT, 0):
        assert eval(str(configuration)) == configuration


@pytest.mark.parametrize("num_ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_ranks_equal_one_process(num_ranks):
    configurations = [c for c in drawn(COUNT, 20261128) if c.num_ranks == num_ranks]
    trained, wrong = 0, {}
    for configuration, outcomes in on_ranks(configurations):
        trained += not outcomes[0].refused
        if faults := faults_of(configuration, outcomes):
            wrong[str(configuration)] = faults
    assert trained
    assert not wrong


def test_every_epoch_trains():
    ((_, (outcome,)),) = on_ranks([Configuration(batches=3, epochs=2, accumulate=2)])
    assert (len(outcome.losses), len(outcome.steps)) == (6, 4)


DROPS = Configuration(
    num_experts=4, capacity_factor=1.0, tokens=(5, 3), policy="random", batches=3, spare_slots=1, validate_every=1
)


@pytest.fixture(scope="module")
def two_ranks():
    ((_, outcomes),) = on_ranks([DROPS])
    return outcomes


def scale_a_weight(outcomes):
    for outcome in outcomes:
        outcome.weights["moes.0.experts.down_proj"][3] *= 1 + 1e-10


def scale_a_weight_of_one_rank(outcomes):
    outcomes[1].weights["moes.0.router.weight"] *= 1 + 1e-15


def make_a_weight_nan(outcomes):
    for outcome in outcomes:
        outcome.weights["inp.bias"] *= np.nan


def change_a_loss(outcomes):
    outcomes[1].losses[2] *= 1 + 1e-10


def change_a_validation_loss(outcomes):
    outcomes[0].validated[1] += 1e-10


def drop_one_more(outcomes):
    outcomes[0].counted[2][0].processed[1] -= 1


def forget_a_step(outcomes):
    outcomes[0].counted.pop()


def place_by_no_policy(outcomes):
    del outcomes[0].steps[1]


SABOTAGES = {
    scale_a_weight: "down_proj differs",
    scale_a_weight_of_one_rank: "ranks have other bits of moes.0.router.weight",
    make_a_weight_nan: "inp.bias differs by nan",
    change_a_loss: "losses differ",
    change_a_validation_loss: "validation differ",
    drop_one_more: "processed of step 2, layer 0",
    forget_a_step: "2 steps instead of 3",
    place_by_no_policy: "placement of step 1",
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_what_is_wrong_is_seen(two_ranks, sabotage):
    assert faults_of(DROPS, two_ranks) == []
    outcomes = copy.deepcopy(two_ranks)
    sabotage(outcomes)
    assert any(SABOTAGES[sabotage] in fault for fault in faults_of(DROPS, outcomes))
