"""A few trials of ``python -m tests.faults``, one for each way to start ranks that tests can afford."""

from dataclasses import replace

import pytest

from tests.faults.trials import Trial, expected_weights, faults_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def expected():
    return expected_weights()


@pytest.mark.exhaustive
@pytest.mark.timeout(200)
def test_those_left_go_on(tmp_path, expected):
    assert faults_of(Trial.of(4, tmp_path, ("fork",), redundancy=2), expected, tmp_path) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(200)
def test_the_first_step_has_second_owners(tmp_path, expected):
    trial = Trial.of(4, tmp_path, ("fork",), redundancy=2)
    assert faults_of(Trial(replace(trial.plan, killed=(0, 0, "forward")), "fork", 1), expected, tmp_path) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(200)
def test_expert_groups_are_each_others_second_owners(tmp_path, expected):
    trial = Trial.of(4, tmp_path, ("fork",), redundancy=2)
    plan = replace(trial.plan, num_ranks=4, killed=(2, 3, "after backward"), expert_parallel_size=2)
    assert faults_of(Trial(plan, "fork", 3), expected, tmp_path) == []


# Killed while saving, and between two steps.
@pytest.mark.timeout(200)
@pytest.mark.exhaustive
@pytest.mark.parametrize(("seed", "launcher"), [(1, "fork"), (2, "popen")])
def test_nothing_is_lost(tmp_path, expected, seed, launcher):
    assert faults_of(Trial.of(seed, tmp_path, (launcher,)), expected, tmp_path) == []
