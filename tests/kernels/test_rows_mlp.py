"""The MLP over rows in place on a CPU, against a loop in fp64; its Triton path is in `interpreted.py`."""

import pytest
import torch

from lightning_swiftmoe.kernels.expert_mlp import rows_mlp
from lightning_swiftmoe.kernels.expert_mlp.row_layout import row_layout
from tests.kernels.rows_oracle import loop_over_residents, make_case, make_layout, relative_errors, run_rows

COUNTS = [[5, 0, 4, 1], [0, 0, 9], [0, 0], [1]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("buffers", [False, True])
def test_plain_torch_matches_a_loop(counts: list[int], activation: str, buffers: bool) -> None:
    case = make_case(counts, 6, 5, activation, 4, torch.float64)
    got = run_rows(case, activation, "torch", buffers)
    assert max(relative_errors(got, loop_over_residents(case, activation), int(case.layout.num_rows))) <= 1e-12


@pytest.mark.parametrize("kept_tiles", [1, 2, 4])
@pytest.mark.parametrize("counts", [[5, 0, 4, 1], [0, 0, 9], [1, 7]], ids=str)
def test_rows_that_are_not_kept(counts: list[int], kept_tiles: int) -> None:
    case = make_case(counts, 6, 5, "swiglu", 4, torch.float64)
    num_rows = int(case.layout.num_rows)
    for buffers in (False, True):
        got = run_rows(case, "swiglu", "torch", buffers, kept_tiles)
        for one, other in zip(got, run_rows(case, "swiglu", "torch"), strict=True):
            used = slice(num_rows if one.shape[0] == case.layout.allocated_rows else None)
            assert torch.equal(one[used], other[used])


def test_parts_of_a_layout() -> None:
    whole = make_layout([5, 0, 4, 1], 4)
    first = row_layout(whole.starts, whole.ends, 4, 4)
    assert (first.starts.tolist(), first.ends.tolist()) == ([0, 4, 4, 4, 4], [4, 4, 4, 4])
    assert (first.order.tolist(), first.tile_expert.tolist(), first.num_rows.tolist()) == ([0, 1, 2, 3], [0], [4])
    rest = row_layout(whole.starts, whole.ends, 16, 4, 4)
    assert (rest.starts.tolist(), rest.ends.tolist()) == ([0, 4, 4, 8, 12], [1, 4, 8, 9])
    assert rest.order.tolist() == [0, -1, -1, -1, 4, 5, 6, 7, 8] + [-1] * 7
    assert (rest.tile_expert.tolist()[:3], rest.num_rows.tolist()) == ([0, 2, 3], [12])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_plain_torch_in_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    case = make_case([20, 0, 3], 16, 24, "swiglu", 8, dtype)
    got = run_rows(case, "swiglu", "torch")
    assert got[2].dtype == torch.float32
    assert max(relative_errors(got, loop_over_residents(case, "swiglu"), int(case.layout.num_rows))) <= tolerance


def test_gradients_that_nobody_wants() -> None:
    case = make_case([5, 2], 6, 5, "swiglu", 4, torch.float64)
    weights = case.up_proj, case.down_proj
    _, pre = rows_mlp.forward_rows(case.rows, *weights, case.layout, "swiglu", "torch")
    args = case.grad_rows, case.rows, case.row_weights, *weights, pre, case.layout, "swiglu", "torch", False
    whole = rows_mlp.backward_rows(*args, [True] * 4)
    for wanted in ((True, True, False, True), (False, True, True, False)):
        some = rows_mlp.backward_rows(*args, wanted)
        for want, got, full in zip(wanted, some, whole, strict=True):
            if want:
                assert torch.equal(got.nan_to_num(), full.nan_to_num())
            else:
                assert got is None


def test_layout_of_the_docstring() -> None:
    layout = make_layout([1, 0, 2], 4)
    assert layout.starts.tolist() == [0, 4, 4, 8]
    assert layout.ends.tolist() == [1, 4, 6]
    assert layout.order.tolist() == [0, -1, -1, -1, 4, 5, -1, -1] + [-1] * 8
    assert layout.tile_expert.tolist()[:2] == [0, 2]
    assert layout.num_rows.tolist() == [8]


def test_buffers_and_sizes_are_checked() -> None:
    case = make_case([5, 2], 8, 4, "gelu", 4, torch.float32)
    weights = case.up_proj, case.down_proj
    with pytest.raises(ValueError, match="out must be a contiguous"):
        rows_mlp.forward_rows(case.rows, *weights, case.layout, "gelu", "torch", case.rows[:, :4])
    with pytest.raises(ValueError, match="rows must be a contiguous"):
        rows_mlp.forward_rows(case.rows[:-1], *weights, case.layout, "gelu", "torch")
    with pytest.raises(ValueError, match="positive multiple of the tile"):
        row_layout(case.layout.starts, case.layout.ends, 6, 4)
