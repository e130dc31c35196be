"""Every kernel compiles ahead of time, without a GPU, for every target we claim, and keeps its registers."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from lightning_swiftmoe.kernels.expert_mlp import activations_triton, gemm_hopper, gemm_triton  # noqa: E402
from lightning_swiftmoe.kernels.router import route_tokens_triton  # noqa: E402
from lightning_swiftmoe.kernels.shards import expert_shards_triton, lent_experts_triton, peer_shards_triton  # noqa: E402
from lightning_swiftmoe.kernels.token_permute import routing_triton, rows_triton  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The others compile the same lines again.
EACH_TARGET = ["sm_90", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in TARGETS if name != "sm_90")]
MAX_SPILL_BYTES = 0  # registers spilled to memory, per thread
MAX_HOPPER_SPILL_BYTES = 32  # the two register budgets of a warp-specialised kernel leave an epilogue a little short

ROWS, INTS, WIDE = "*bf16", "*i32", "*fp32"
LOANS = dict.fromkeys(("copies", "lenders", "multiplicity"), INTS)
ACT = {"ACT": 0, "GATED": True, "BLOCK": 1024}

# Kernel, pointer arguments, compile-time arguments (None: absent), warps.
PORTABLE: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    (routing_triton.histogram_kernel, {"topk_idx": "*i64", "histograms": INTS}, {"BLOCK": 1024, "BINS": 32}, 4),
    (
        routing_triton.prefix_kernel,
        dict.fromkeys(("histograms", "offsets", "starts", "ends"), INTS),
        {"TILE": 128, "BINS": 32, "CHUNK": 256},
        8,
    ),
    (
        routing_triton.scatter_kernel,
        {"topk_idx": "*i64", **dict.fromkeys(("offsets", "starts", "ends", "inverse", "order", "tile_expert"), INTS)},
        {"TILE": 128, "BLOCK": 1024, "BINS": 32, "TILES": 32},
        4,
    ),
    (
        routing_triton.route_block_kernel,
        {"topk_idx": "*i64", **dict.fromkeys(("starts", "ends", "inverse", "order", "tile_expert"), INTS)},
        {"TILE": 128, "BLOCK": 1024, "BINS": 32, "TILES": 32},
        8,
    ),
    (
        routing_triton.row_layout_kernel,
        dict.fromkeys(("starts", "ends", "part_starts", "part_ends", "order", "tile_expert"), INTS),
        {"TILE": 128, "BINS": 32, "TILES": 32},
        4,
    ),
    (
        rows_triton.spread_rows_kernel,
        {"source": ROWS, "rows": ROWS} | dict.fromkeys(("inverse", "starts", "ends"), INTS),
        {"TOP_K": 2, "TOKENS": 1, "PARTS": 8, "BLOCK": 2048},
        4,
    ),
    (
        rows_triton.combine_rows_kernel,
        {"rows": ROWS, "out": ROWS, "weights": WIDE, "inverse": INTS},
        {"WEIGHTED": True, "TOP_K": 2, "TOKENS": 2, "BLOCK": 1024},
        4,
    ),
    (
        rows_triton.router_grad_kernel,
        {"partials": WIDE, "grad_weights": WIDE, "inverse": INTS},
        {"BLOCK": 256},
        4,
    ),
    (rows_triton.sum_partials_kernel, {"partials": WIDE, "total": WIDE, "num_rows": INTS}, {"BLOCK": 256}, 4),
    (activations_triton.act_forward_kernel, {"pre": ROWS, "hidden": ROWS, "num_rows": INTS}, ACT, 4),
    (
        activations_triton.act_backward_kernel,
        dict.fromkeys(("pre", "grad_hidden", "grad_pre", "scaled_hidden"), ROWS)
        | {"weights": WIDE, "order": INTS, "grad_scale": WIDE, "num_rows": INTS},
        ACT,
        4,
    ),
    (
        gemm_triton.rows_gemm_portable_kernel,
        {"rows": ROWS, "weight": ROWS, "out": ROWS, "tile_expert": INTS, "num_rows": INTS},
        {"TILE": 128, "BN": 128, "BK": 32, "PRECISION": "ieee"},
        8,
    ),
    (
        gemm_triton.weight_gemm_portable_kernel,
        {"left": ROWS, "right": ROWS, "out": ROWS, "starts": INTS, "ends": INTS},
        {"BM": 128, "BN": 128, "BK": 32, "PRECISION": "ieee"},
        8,
    ),
    (
        route_tokens_triton.route_tokens_kernel,
        {"topk_idx": "*i64", "counts": INTS} | dict.fromkeys(("logits", "bias", "topk_weights", "sums"), WIDE),
        {"TOP_K": 8, "CHOICES": 8, "BINS": 128, "BLOCK": 8, "SIGMOID": True, "NORMALIZE": True},
        4,
    ),
    (
        route_tokens_triton.route_tokens_grad_kernel,
        {"topk_idx": "*i64"}
        | dict.fromkeys(("logits", "grad_weights", "grad_prob_sum", "grad_z_sum", "grad_logits"), WIDE),
        {"TOP_K": 8, "BINS": 128, "BLOCK": 8, "SIGMOID": True, "NORMALIZE": True},
        4,
    ),
    (
        route_tokens_triton.auxiliary_losses_kernel,
        {"counts": "*i64"} | dict.fromkeys(("prob_sum", "z_sum", "out"), WIDE),
        {"BINS": 128},
        4,
    ),
    (expert_shards_triton.wire_kernel, {"rows": WIDE, "wire": ROWS}, {"TO_WIRE": True, "BLOCK": 2048}, 4),
    (
        route_tokens_triton.auxiliary_losses_kernel,
        {"counts": "*i64"} | dict.fromkeys(("prob_sum", "z_sum", "out"), WIDE),
        {"BINS": 128},
        4,
    ),
    (expert_shards_triton.wire_kernel, {"rows": ROWS, "wire": ROWS}, {"TO_WIRE": False, "BLOCK": 2048}, 4),
    (
        expert_shards_triton.gather_kernel,
        {"shard": WIDE, "experts": "*i64", "out": ROWS},
        {"BLOCK": 2048},
        4,
    ),
    (
        expert_shards_triton.sum_kernel,
        {"arrived": ROWS, "order": "*i64", "starts": "*i64", "total": WIDE, "scale": "fp32"},
        {"WIDE": triton.language.float32, "BLOCK": 2048},
        4,
    ),
    (
        peer_shards_triton.push_shards_kernel,
        {"shard": WIDE, "peers": "*i64", "first": INTS, "hosts": INTS, "numbers": INTS},
        {"DTYPE": triton.language.bfloat16, "BLOCK": 2048},
        4,
    ),
    (
        peer_shards_triton.pull_shards_kernel,
        {"total": WIDE, "peers": "*i64", "first": INTS, "hosts": INTS, "numbers": INTS, "scale": "fp32"},
        {"INDIRECT": False, "ELEMENT": triton.language.float32, "DTYPE": triton.language.bfloat16, "BLOCK": 2048},
        4,
    ),
    (
        peer_shards_triton.pull_shards_kernel,
        {"total": "*i64", "peers": "*i64", "first": INTS, "hosts": INTS, "numbers": INTS, "scale": "fp32"},
        {"INDIRECT": True, "ELEMENT": triton.language.float32, "DTYPE": triton.language.bfloat16, "BLOCK": 1024},
        4,
    ),
    (
        lent_experts_triton.fetch_experts_kernel,
        {**LOANS, "weights": ROWS, "peers": "*i64"},
        {"COPIES": 2, "BINS": 256, "DTYPE": triton.language.bfloat16, "BLOCK": 2048},
        4,
    ),
    (
        lent_experts_triton.offer_gradients_kernel,
        {"copies": INTS, "grads": ROWS, "offered": ROWS},
        {"COPIES": 2, "BLOCK": 2048},
        4,
    ),
    (
        lent_experts_triton.collect_gradients_kernel,
        {**LOANS, "grads": ROWS, "peers": "*i64"},
        {
            "COPIES": 2,
            "LANES": 16,
            "BINS": 256,
            "DTYPE": triton.language.bfloat16,
            "WIDE": triton.language.float32,
            "BLOCK": 2048,
        },
        4,
    ),
]


def descriptor(*block: int) -> str:
    return f"tensordesc<bf16{list(block)},{gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)!r}>"


HOPPER_TILE = {"BM": 128, "BN": 256, "BK": 64, "STAGES": 3, "WARPS": 8, "COPIERS": 4, "GROUP_M": 8}
ROUTED = {"order": INTS, "tile_expert": INTS, "num_rows": INTS}
FULL = {"pre_desc": descriptor(128, 128), "out_desc": descriptor(128, 128)}
CHUNKS = dict.fromkeys(("pre_desc", "grad_pre_desc", "scaled_desc"), descriptor(128, 64))
WEIGHT = {"order": INTS, "b_desc": descriptor(64, 256), "out_desc": descriptor(128, 128), "starts": INTS, "ends": INTS}
HOPPER: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (
        gemm_hopper.rows_gemm_kernel,
        {**ROUTED, **FULL, "a": ROWS, "b_desc": descriptor(128, 64)},
        {"TOP_K": 8, "NT": True, "GATED": True, "ACT": 0, **HOPPER_TILE},
    ),
    (
        gemm_hopper.rows_gemm_kernel,
        {**ROUTED, **FULL, "a": ROWS, "b_desc": descriptor(256, 64)},
        {"TOP_K": 1, "NT": True, "GATED": False, "ACT": 5, **HOPPER_TILE},
    ),
    (
        gemm_hopper.rows_gemm_kernel,
        {**ROUTED, **FULL, "a": descriptor(128, 64), "b_desc": descriptor(64, 256)},
        {"TOP_K": 0, "NT": False, "GATED": False, "ACT": -1, **HOPPER_TILE},
    ),
    (
        gemm_hopper.hidden_grad_kernel,
        {**ROUTED, **CHUNKS, "grad_y": ROWS, "b_desc": descriptor(64, 256), "weights": WIDE, "partials": WIDE},
        {"TOP_K": 8, "GATED": True, "ACT": 0, **HOPPER_TILE},
    ),
    (
        gemm_hopper.hidden_grad_kernel,
        {**ROUTED, **CHUNKS, "grad_y": ROWS, "b_desc": descriptor(64, 256), "weights": WIDE, "partials": WIDE},
        {"TOP_K": 1, "GATED": False, "ACT": 5, **HOPPER_TILE},
    ),
    (
        gemm_hopper.rows_gemm_kernel,
        {**ROUTED, **FULL, "a": descriptor(128, 64), "b_desc": descriptor(128, 64)},
        {"TOP_K": 0, "NT": True, "GATED": True, "ACT": 0, **HOPPER_TILE},
    ),
    (
        gemm_hopper.rows_gemm_kernel,
        {**ROUTED, **FULL, "a": descriptor(128, 64), "b_desc": descriptor(256, 64)},
        {"TOP_K": 0, "NT": True, "GATED": False, "ACT": 5, **HOPPER_TILE},
    ),
    (
        gemm_hopper.hidden_grad_kernel,
        {**ROUTED, **CHUNKS, "grad_y": descriptor(128, 64), "b_desc": descriptor(64, 256)}
        | {"weights": WIDE, "partials": WIDE},
        {"TOP_K": 0, "GATED": True, "ACT": 0, **HOPPER_TILE},
    ),
    (
        gemm_hopper.hidden_grad_kernel,
        {**ROUTED, **CHUNKS, "grad_y": descriptor(128, 64), "b_desc": descriptor(64, 256)}
        | {"weights": WIDE, "partials": WIDE},
        {"TOP_K": 0, "GATED": False, "ACT": 5, **HOPPER_TILE},
    ),
    (
        gemm_hopper.weight_gemm_kernel,
        {**WEIGHT, "a": ROWS},
        {"TOP_K": 8, "TRANSPOSED": False, **HOPPER_TILE},
    ),
    (
        gemm_hopper.weight_gemm_kernel,
        {**WEIGHT, "a": ROWS},
        {"TOP_K": 8, "TRANSPOSED": True, **HOPPER_TILE},
    ),
    (
        gemm_hopper.weight_gemm_kernel,
        {**WEIGHT, "a": descriptor(64, 128)},
        {"TOP_K": 0, "TRANSPOSED": False, **HOPPER_TILE},
    ),
]


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    target: Any,
    divisible: tuple[str, ...] = (),
) -> Any:
    """Compile for a target; `divisible` names arguments known to be multiples of 16, as Triton sees at run time."""
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, values, attrs)
    return triton.compile(source, target=target, options={"num_warps": warps})


def spill_bytes(compiled: Any, tmp_path: Path) -> int:
    """Bytes of stack per thread that hold spilled registers."""
    if "amdgcn" in compiled.asm:
        # Scalar registers spill into lanes of vector registers, not to memory.
        return 4 * sum(int(n) for n in re.findall(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    return max(int(n) for n in re.findall(r"STACK:(\d+)", report.stdout + report.stderr))


@pytest.mark.parametrize("target", EACH_TARGET)
@pytest.mark.parametrize("case", PORTABLE, ids=lambda case: case[0].__name__)
def test_portable_kernels_compile_everywhere(case: tuple, target: str, tmp_path: Path) -> None:
    kernel, pointers, constants, warps = case
    compiled = compile_kernel(kernel, pointers, constants, warps, TARGETS[target])
    assert spill_bytes(compiled, tmp_path) <= MAX_SPILL_BYTES


@pytest.mark.parametrize("target", EACH_TARGET)
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("unit", ["stride_k", "stride_n"])
def test_portable_gemm_as_it_runs(unit: str, dtype: str, target: str, tmp_path: Path) -> None:
    """Sizes are multiples of 16, and one stride is 1, which Triton compiles into the kernel."""
    pointers = {"rows": dtype, "weight": dtype, "out": dtype, "tile_expert": INTS, "num_rows": INTS}
    constants = {"TILE": 128, "BN": 128, "BK": 32, "PRECISION": "ieee", unit: 1}
    other = "stride_n" if unit == "stride_k" else "stride_k"
    divisible = ("rows", "weight", "out", "K", "N", "stride_expert", other)
    compiled = compile_kernel(gemm_triton.rows_gemm_portable_kernel, pointers, constants, 8, TARGETS[target], divisible)
    assert spill_bytes(compiled, tmp_path) <= MAX_SPILL_BYTES


@pytest.mark.parametrize("case", HOPPER, ids=lambda case: case[0].__name__)
def test_hopper_kernels_compile(case: tuple, tmp_path: Path) -> None:
    kernel, pointers, constants = case
    divisible = tuple(n for n in ("a", "grad_y", "K", "M", "N") if pointers.get(n, ROWS) == ROWS)
    divisible = tuple(n for n in divisible if n in kernel.arg_names)
    compiled = compile_kernel(kernel, pointers, constants, 8, TARGETS["sm_90"], divisible)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert spill_bytes(compiled, tmp_path) <= MAX_HOPPER_SPILL_BYTES


def test_every_kernel_is_compiled() -> None:
    """A new `*_kernel` must join the lists above."""
    modules = (
        activations_triton,
        gemm_hopper,
        gemm_triton,
        route_tokens_triton,
        routing_triton,
        rows_triton,
        expert_shards_triton,
        peer_shards_triton,
        lent_experts_triton,
    )
    known = {case[0].__name__ for case in (*PORTABLE, *HOPPER)}
    assert known == {name for module in modules for name in vars(module) if name.endswith("_kernel")}
