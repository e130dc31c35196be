"""Expert state through peers' memory: the kernels in the interpreter, in a process of its own, and compiled."""

import pytest
import torch

from lightning_swiftmoe.kernels.shards.peer_shards import Residents
from tests.interpreter import run_interpreted

pytest.importorskip("triton")


def test_kernels_in_the_interpreter() -> None:
    assert run_interpreted("tests.kernels.peer_shards_interpreted") == "ok\n"


def test_residents_stand_by_rank() -> None:
    places = Residents.of([[0, 2], [2]], 3)
    assert places.first.tolist() == [0, 1, 1, 3]
    assert places.host.tolist() == [0, 0, 1]
    assert places.resident.tolist() == [0, 1, 0]
    assert places.host.dtype == torch.int32
    assert places.num_experts == 3
