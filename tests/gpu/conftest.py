"""One rank and two ranks, shared by all tests of this folder."""

from collections import defaultdict

import pytest
import torch

from tests.gpu.rank_pool import DEVICE, RankPool


def pytest_collection_modifyitems(items):
    """Without GPUs there is nothing to test, except where somebody tries the harness itself."""
    if DEVICE == "cpu":
        return
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("gpu") is None or "tests/gpu/" not in item.path.as_posix():
            continue
        needed = 2 if {"two", "two_gpus"} & set(item.fixturenames) else 1
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))


@pytest.fixture(scope="session")
def one():
    """A single rank, with the strategy or without."""
    pool = RankPool(1)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def pairs():
    """Two ranks for each transport, so that one that breaks does not take the others along."""
    pools = defaultdict(lambda: RankPool(2))
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def two(pairs, transport):
    """Two ranks, each with a GPU."""
    return pairs[transport]


@pytest.fixture
def two_gpus():
    """For tests that start their own ranks."""
