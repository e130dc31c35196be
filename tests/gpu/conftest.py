"""One rank and several ranks, shared by all tests of this folder."""

from collections import defaultdict

import pytest
import torch

from tests.gpu.rank_pool import DEVICE, NUM_RANKS, RankPool


def pytest_collection_modifyitems(items):
    """Without GPUs there is nothing to test, except where somebody tries the harness itself."""
    if DEVICE == "cpu":
        return
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("gpu") is None or "tests/gpu/" not in item.path.as_posix():
            continue
        needed = 1
        if "two_gpus" in item.fixturenames:
            needed = 2
        if "several" in item.fixturenames:
            needed = NUM_RANKS
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))


@pytest.fixture(scope="session")
def one():
    """A single rank, with the strategy or without."""
    pool = RankPool(1)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def by_transport():
    """Several ranks for each transport, so that one that breaks does not take the others along."""
    pools = defaultdict(lambda: RankPool(NUM_RANKS))
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def several(by_transport, transport):
    """``NUM_RANKS`` ranks, each with a GPU."""
    return by_transport[transport]


@pytest.fixture
def two_gpus():
    """For tests that start their own ranks."""
