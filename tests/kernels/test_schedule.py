"""Which program of a Hopper GEMM computes which tile: each tile one of them, whatever the schedule."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lightning_swiftmoe.kernels.expert_mlp import gemm_hopper, hopper


@pytest.fixture(autouse=True)
def _persistent_again() -> None:
    yield
    hopper.set_tiles_per_program(None)


@pytest.mark.parametrize("tiles_per_program", [None, 1, 4])
@pytest.mark.parametrize("total", [0, 1, 131, 132, 133, 1000])
@pytest.mark.parametrize("spare", [0, 300])
def test_every_tile_is_computed_once(
    tiles_per_program: int | None, total: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device function itself, run for every program of the grid."""
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    hopper.set_tiles_per_program(tiles_per_program)
    grid, stride, span = hopper._schedule(torch.device("meta"), total + spare)
    tiles: list[int] = []
    for program in range(grid[0]):
        language = SimpleNamespace(program_id=lambda axis, program=program: program, minimum=min)
        monkeypatch.setattr(gemm_hopper, "gl", language)
        first, last = gemm_hopper._turns.fn(total, stride, span)
        mine = list(range(first, last, stride))
        assert tiles_per_program is None or len(mine) <= tiles_per_program
        tiles += mine
    assert sorted(tiles) == list(range(total))


def test_a_program_has_at_least_one_tile() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        hopper.set_tiles_per_program(0)
