"""Which kernels a step compiles: all at set-up, none for its numbers of rows. Triton's own keys, without a GPU."""

import random
from contextlib import nullcontext

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from lightning_swiftmoe.kernels import warmup  # noqa: E402
from lightning_swiftmoe.kernels.launch import Launch, recorded  # noqa: E402
from lightning_swiftmoe.kernels.shards import expert_shards_triton  # noqa: E402
from lightning_swiftmoe.kernels.warmup import LayerShape, record_layer  # noqa: E402
from lightning_swiftmoe.placement import EvenShards  # noqa: E402
from tests.kernels.rows_oracle import launch_rows  # noqa: E402

TILE = 128
COUNTS = [1, 2, 15, 16, 17, 127, 128, 1000, 1023, 1024, 1025, 2**14 + 16, 2**15, 2**17, 3 * 2**17 + 1]
SHAPES = [
    LayerShape(768, 3072, 16, 1, torch.bfloat16, torch.float32, "gelu", "hopper"),
    LayerShape(2048, 768, 128, 8, torch.bfloat16, torch.float32, "swiglu", "hopper"),
    LayerShape(192, 320, 3, 3, torch.float16, torch.float32, "relu2", "hopper"),  # weight gradients portable
    LayerShape(1024, 4096, 1, 1, torch.float32, torch.float32, "swiglu", "triton"),
    LayerShape(104, 136, 6, 2, torch.bfloat16, torch.bfloat16, "swiglu", "grouped_mm"),
]


def key(launch: Launch) -> tuple[str, int, str]:
    """What Triton compiles anew for."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, _ = bind(*launch.described(), **launch.constants)
    return launch.name, launch.num_warps, str(specialization)


def keys(launches: list[Launch]) -> set[tuple[str, int, str]]:
    return {key(launch) for launch in launches}


def random_counts(number: int) -> list[int]:
    rng = random.Random(0)
    return COUNTS + [int(2 ** rng.uniform(0, 19)) for _ in range(number)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.path}-{shape.width}-{shape.activation}")
def test_no_number_of_rows_compiles(shape: LayerShape) -> None:
    residents = shape.num_experts + 1
    compiled = keys(record_layer(shape, TILE))
    with recorded() as launches:
        launch_rows(shape, residents, TILE, TILE)
    compiled |= keys(launches)
    for count in random_counts(200):
        with recorded() as launches:
            warmup.run_expert_mlp(shape, count, TILE)
            launch_rows(shape, residents, -(-count // TILE) * TILE, TILE)
        assert keys(launches) <= compiled, f"{count} rows"


@pytest.mark.parametrize("biased", [False, True])
def test_no_number_of_tokens_compiles_the_router(biased: bool) -> None:
    seen = set()
    for count in random_counts(200):
        with recorded() as launches:
            warmup.run_router(count, 60, 4, "softmax", True, biased)
        seen |= keys(launches)
    assert sorted(name for name, *_ in seen) == [
        "auxiliary_losses_kernel",
        "route_tokens_grad_kernel",  # with losses, and without
        "route_tokens_grad_kernel",
        "route_tokens_kernel",
    ]


def move_shards(residents: int, shapes: list[tuple[int, int]], ranks: int) -> None:
    """What a step launches for expert state, on the meta device."""
    bounds = [EvenShards(rows, cols, ranks).bounds for rows, cols in shapes]
    index = torch.empty(ranks * residents, dtype=torch.int64, device="meta")
    for k, (rows, cols) in enumerate(shapes):
        grads = torch.empty(residents, rows * cols, dtype=torch.bfloat16, device="meta")
        shard = torch.empty(5, bounds[k][1], device="meta")
        expert_shards_triton.launch_wire(grads, grads, k, bounds, to_wire=True)
        expert_shards_triton.launch_wire(grads, grads, k, bounds, to_wire=False)
        expert_shards_triton.launch_gather(shard, index, grads, 0)
        expert_shards_triton.launch_sum(grads, index, index, shard, 0, 1 / ranks)


def test_no_number_of_residents_or_blocks_compiles_the_shard_moves() -> None:
    shapes = [(10, 100), (7, 16)]
    with recorded() as launches:
        for count in (1, 2, 15, 16, 17, 64):
            move_shards(count, shapes, 3)
    assert len(keys(launches)) == 6  # wire to and fro once for each parameter's size


def test_launches_are_made_again_after_recording() -> None:
    with pytest.raises(RuntimeError, match="from inside"), recorded() as launches:
        raise RuntimeError("from inside")
    assert not launches
    with recorded() as outer, recorded() as inner:
        move_shards(1, [(10, 100)], 3)
    assert inner
    assert not outer


def test_grids_are_valid_for_large_experts() -> None:
    """Beyond 65,535 only x: an expert of Mixtral 8x7B, many ranks."""
    shape = LayerShape(4096, 14336, 256, 8, torch.float32, torch.float32, "swiglu", "triton")
    with recorded() as launches:
        move_shards(300, [(2 * 14336, 4096)], 2)
        warmup.run_expert_mlp(shape, 2**20, TILE)
        launch_rows(shape, 256, 2**21, TILE)
    grids = [launch.grid for launch in launches]
    assert max(grid[0] for grid in grids) > 65_535
    assert all(grid[0] < 2**31 and max(grid[1:]) <= 65_535 for grid in grids)


class Device:
    """As much of a Triton driver as compiling takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_compiling_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, progress, and nothing left to do the second time; without a GPU the code is not loaded."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Device())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(triton.compiler.CompiledKernel, "run", None)
    with recorded() as launches:
        warmup.run_router(1, 12, 2, "sigmoid", True, True)
        warmup.run_router(77, 12, 2, "sigmoid", True, True)
    calls: list[tuple[int, int, str]] = []
    device = torch.device("cuda")
    assert warmup.compile_launches(launches, device, lambda *call: calls.append(call)) == 4
    assert calls == [
        (1, 4, "route_tokens_kernel"),
        (2, 4, "auxiliary_losses_kernel"),
        (3, 4, "route_tokens_grad_kernel"),
        (4, 4, "route_tokens_grad_kernel"),
    ]
    assert warmup.compile_launches(launches, device) == 0


def test_nothing_to_compile_without_cuda() -> None:
    assert warmup.compile_expert_kernels(8, 8, 4, 1, torch.float32, "gelu", torch.device("cpu")) == 0
