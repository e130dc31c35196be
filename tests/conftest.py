"""Settings every test shares."""

import pytest
import torch

# Ranks are forked from this process, and a forked OpenMP pool hangs: keep to one thread.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
