"""Unless a test says otherwise, it runs on each of our systems and under DDP."""

import pytest

from tests.semantics.systems import DDP, OURS, at_first


@pytest.fixture(params=at_first([*OURS, DDP]), ids=str)
def system(request):
    return request.param
