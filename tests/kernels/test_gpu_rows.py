"""Rows in place, set-up compilation and large grids, with what only a GPU can show. Run with `pytest -m gpu`."""

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lightning_swiftmoe.functional import expert_mlp
from lightning_swiftmoe.kernels import dispatch, warmup
from lightning_swiftmoe.kernels.expert_mlp import hopper, rows_mlp
from lightning_swiftmoe.kernels.expert_mlp.row_layout import row_layout, row_layout_reference
from lightning_swiftmoe.kernels.launch import recorded
from lightning_swiftmoe.kernels.warmup import LayerShape
from tests.kernels.rows_oracle import (
    Case,
    check_same_layout,
    launch_rows,
    loop_over_residents,
    make_case,
    make_layout,
    relative_errors,
    run_rows,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
TILE = 128
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
PATHS = [
    ("hopper", torch.bfloat16),
    ("hopper", torch.float16),
    ("triton", torch.bfloat16),
    ("triton", torch.float32),
    ("grouped_mm", torch.bfloat16),
    ("torch", torch.bfloat16),
    ("torch", torch.float64),
]
SIZES = [
    ([300, 0, 1, 128, 127], 256, 384, "swiglu"),
    ([0, 0, 1000], 128, 256, "gelu"),
    ([0, 0, 0], 128, 128, "swiglu"),
    ([700, 3], 192, 320, "relu2"),  # weight gradients that our tile does not divide
    ([200] * 40, 512, 640, "geglu"),
    ([40, 4000], 2688, 2816, "silu"),  # wider than where the one-process path stops gathering
]


def needs(path: str) -> None:
    if path == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
def test_rows_match_a_loop_in_fp64(path: str, dtype: torch.dtype, size: tuple, buffers: bool) -> None:
    needs(path)
    counts, width, hidden, activation = size
    case = make_case(counts, width, hidden, activation, TILE, dtype, "cuda")
    got = run_rows(case, activation, path, buffers)
    errors = relative_errors(got, loop_over_residents(case, activation), int(case.layout.num_rows))
    assert max(errors) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("kept_tiles", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
def test_rows_that_are_not_kept_have_the_same_bits(path: str, dtype: torch.dtype, size: tuple, kept_tiles: int) -> None:
    needs(path)
    counts, width, hidden, activation = size
    case = make_case(counts, width, hidden, activation, TILE, dtype, "cuda")
    kept_tiles = min(kept_tiles, case.layout.allocated_rows // TILE - 1)
    got = run_rows(case, activation, path, kept_tiles=kept_tiles)
    for one, other in zip(got, run_rows(case, activation, path), strict=True):
        used = slice(int(case.layout.num_rows) if one.shape[0] == case.layout.allocated_rows else None)
        assert torch.equal(one[used], other[used])


def test_rows_give_the_same_bits_on_every_run() -> None:
    needs("hopper")
    first, again = (
        run_rows(make_case([500, 0, 77], 256, 512, "swiglu", TILE, torch.bfloat16, "cuda"), "swiglu", "hopper")
        for _ in range(2)
    )
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[:640].nan_to_num(), other[:640].nan_to_num())


@pytest.mark.parametrize("tiles", [1, 4])
def test_short_programs_give_the_same_bits(tiles: int) -> None:
    needs("hopper")
    results = []
    for tiles_per_program in (None, tiles):
        hopper.set_tiles_per_program(tiles_per_program)
        try:
            case = make_case([5000, 0, 300], 512, 1024, "swiglu", TILE, torch.bfloat16, "cuda")
            results.append(run_rows(case, "swiglu", "hopper"))
        finally:
            hopper.set_tiles_per_program(None)
    for one, other in zip(*results, strict=True):
        used = slice(int(case.layout.num_rows) if one.shape[0] == case.layout.allocated_rows else None)
        assert torch.equal(one[used], other[used])


@pytest.mark.parametrize("counts", [[0], [1, 0, 300], [0, 0], [130] * 200], ids=str)
def test_layout_matches_its_reference(counts: list[int]) -> None:
    whole = make_layout(counts, TILE, CUDA)
    num_tiles = whole.allocated_rows // TILE
    for first, tiles in ((0, num_tiles), (0, 1), (TILE, num_tiles - 1), ((num_tiles - 1) * TILE, 1)):
        layout = row_layout(whole.starts, whole.ends, tiles * TILE, TILE, first)
        check_same_layout(layout, row_layout_reference(whole.starts, whole.ends, tiles * TILE, TILE, first))


def rows_step(case: Case, path: str) -> None:
    weights = case.up_proj, case.down_proj
    _, pre = rows_mlp.forward_rows(case.rows, *weights, case.layout, "swiglu", path)
    rows_mlp.backward_rows(
        case.grad_rows, case.rows, case.row_weights, *weights, pre, case.layout, "swiglu", path, True, [True] * 4
    )


def mlp_step(num_tokens: int, width: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_tokens, width, device=CUDA, dtype=dtype, requires_grad=True)
    idx = torch.randint(experts, (num_tokens, top_k), device=CUDA)
    weights = torch.rand(num_tokens, top_k, device=CUDA, requires_grad=True)
    up = torch.randn(experts, 2 * hidden, width, device=CUDA, dtype=dtype, requires_grad=True)
    down = torch.randn(experts, width, hidden, device=CUDA, dtype=dtype, requires_grad=True)
    expert_mlp(x, idx, weights, up, down, "swiglu").sum().backward()


def test_nothing_compiles_after_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    width, hidden, experts, residents, top_k, dtype = 256, 384, 6, 3, 2, torch.bfloat16
    path = dispatch.choose_path(CUDA, dtype, width, hidden, experts, "swiglu", "auto")
    warmup.compile_expert_kernels(width, hidden, experts, top_k, dtype, "swiglu", CUDA)
    assert warmup.compile_expert_kernels(width, hidden, experts, top_k, dtype, "swiglu", CUDA) == 0
    with recorded() as launches:
        launch_rows(
            LayerShape(width, hidden, experts, top_k, dtype, torch.float32, "swiglu", path), residents, TILE, TILE
        )
    warmup.compile_launches(launches, CUDA)
    compiled: list[str] = []

    def note(**hook: Any) -> bool:
        compiled.append(str(hook.get("repr")))
        return False

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    rng = random.Random(0)
    counts = [0, 1, 16, 17, 1023, 1024, 1025, *(int(2 ** rng.uniform(0, 14)) for _ in range(193))]
    for count in counts:
        mlp_step(count, width, hidden, experts, top_k, dtype)
        split = [count // 3, count % 7, count // 2]
        rows_step(make_case(split, width, hidden, "swiglu", TILE, dtype, "cuda"), path)
    assert not compiled


def test_rows_do_not_wait_for_the_host() -> None:
    case = make_case([300, 0, 5], 256, 384, "swiglu", TILE, torch.bfloat16, "cuda")
    path = dispatch.choose_path(CUDA, torch.bfloat16, 256, 384, 3, "swiglu", "auto")
    rows_step(case, path)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows_step(case, path)
        mlp_step(0, 256, 384, 3, 2, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
