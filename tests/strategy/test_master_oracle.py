"""The master test: N ranks, an arbitrary placement on every step, and the weights of one process."""

import pytest
import torch

from tests.jobs import Job, adamw, largest_error, sgd, train, train_alone
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def compare(num_ranks, job, bound):
    expected = train_alone(job)
    results = run_ranks(num_ranks, train, job)
    for result in results:
        assert largest_error(result, expected) < bound
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("top_k", [1, 2])
def test_ranks_equal_one_process(num_ranks, optimizer, top_k):
    slots = -(-5 // num_ranks) + 1
    compare(num_ranks, Job(optimizer=optimizer, top_k=top_k, slots=slots), 1e-9)
