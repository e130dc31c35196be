"""A few trials of ``python -m tests.faults``, one for each way to start ranks that tests can afford."""

import pytest

from tests.faults.trials import Trial, expected_weights, faults_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def expected():
    return expected_weights()


# Killed while saving, and between two steps.
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("seed", "launcher"), [(1, "fork"), (2, "popen")])
def test_nothing_is_lost(tmp_path, expected, seed, launcher):
    assert faults_of(Trial.of(seed, tmp_path, (launcher,)), expected, tmp_path) == []
