"""Settings every test shares."""

import os

import pytest
import torch
import torch.distributed as dist

# Ranks are forked from this process, and a forked OpenMP pool hangs: keep to one thread, also where Lightning
# would choose a number (it respects the variable).
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """The longest first: of two workers none should begin one when the other is done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_trace_of_other_ranks():
    """Lightning leaves addresses and a process group behind; the next test must not find them."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
