"""Expert state through peers' memory: the kernels in the interpreter, in a process of its own, and compiled."""

import os
import subprocess
import sys

import pytest
import torch

from lightning_swiftmoe.kernels.shards.peer_shards import Residents

pytest.importorskip("triton")


def test_kernels_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.peer_shards_interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout == "ok\n"


def test_residents_stand_by_rank() -> None:
    places = Residents.of([[0, 2], [2]], 3)
    assert places.first.tolist() == [0, 1, 1, 3]
    assert places.host.tolist() == [0, 0, 1]
    assert places.resident.tolist() == [0, 1, 0]
    assert places.host.dtype == torch.int32
    assert places.num_experts == 3
