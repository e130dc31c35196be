"""Every kernel of token dispatch compiles ahead of time for every target we claim, and keeps its registers."""

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from lightning_swiftmoe.kernels import indirect_triton  # noqa: E402
from lightning_swiftmoe.kernels.token_dispatch import (  # noqa: E402
    address_triton,
    barrier_triton,
    borrow_triton,
    move_triton,
    plan_triton,
    split_triton,
)
from tests.kernels.test_aot import EACH_TARGET, MAX_SPILL_BYTES, TARGETS, compile_kernel, spill_bytes  # noqa: E402

ROWS, INTS, LONGS, WIDE = "*bf16", "*i32", "*i64", "*fp32"
PLAN_INTS = ("multiplicity", "kept", "share", "source_start", "host_start", "send", "recv", "send_until", "base")
ROW_INTS = ("residents", "starts", "ends", "recv_until", "arrival_base", "tile_expert", "order", "inverse")
SUMS = ("rank_load", "send_rows", "recv_rows", "needed_rows")
HOSTS = {"PACKED": True, "TILE": 128, "BINS": 256, "SLOTS": 32, "BLOCK": 1024}
SCAN = {"EXPERTS": 2, "CHUNK": 512}
PLACES = dict.fromkeys(("hosts", "rows"), INTS)
MOVE = {
    "LOCAL": False,
    "INDIRECT": False,
    "ELEMENT": tl.bfloat16,
    "WEIGHT": tl.float32,
    "TOP_K": 8,
    "TOKENS": 1,
    "BLOCK": 2048,
}

# Kernel, argument types other than i32, compile-time arguments (None: absent), warps.
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    (plan_triton.rank_totals_kernel, {"counts": LONGS, "totals": LONGS}, {"RANKS": 8, "BINS": 256}, 4),
    *(
        (
            plan_triton.scan_ranks_kernel,
            {"counts": LONGS, "totals": LONGS, "factor_bits": "i64", "replicas": INTS} | dict.fromkeys(PLAN_INTS, INTS),
            {"CLUSTER_SCOPE": scope == "cluster", "RANK_SCOPE": scope == "rank", **SCAN, "GIVEN": given},
            8,
        )
        for scope, given in ((None, False), ("cluster", False), ("rank", False), ("rank", True))
    ),
    (
        plan_triton.even_shares_kernel,
        {"counts": LONGS, "totals": LONGS, "load": LONGS, "factor_bits": "i64", "replicas": INTS}
        | dict.fromkeys(PLAN_INTS, INTS),
        {"CLUSTER_SCOPE": True, "RANK_SCOPE": False, **SCAN},
        8,
    ),
    (
        plan_triton.keep_within_ranks_kernel,
        {"share": INTS, "totals": LONGS, "factor_bits": "i64"},
        {"BINS": 256, "CHUNK": 512},
        4,
    ),
    *(
        (
            plan_triton.plan_hosts_kernel,
            dict.fromkeys((*PLAN_INTS, *ROW_INTS, "copies"), INTS) | dict.fromkeys(SUMS, LONGS),
            {**HOSTS, "PACKED": packed, "COPIES": copies},
            4,
        )
        for packed, copies in ((False, 0), (True, 0), (False, 2))
    ),
    *(
        (
            plan_triton.name_rows_kernel,
            dict.fromkeys(ROW_INTS, INTS),
            {"PACKED": packed, "STEPS": 11, "TILE": 128, "SLOTS": 32},
            4,
        )
        for packed in (False, True)
    ),
    *(
        (
            split_triton.exact_split_kernel,
            {"load": LONGS} | dict.fromkeys(("share", "turns", "num_turns"), INTS),
            {"ROUNDS": 8, "NUMERATOR": 2, "DENOMINATOR": 5, "EVEN_ENOUGH": 2048, "LANES": lanes, "EXPERTS": experts},
            warps,
        )
        for lanes, experts, warps in ((64, 8, 1), (2048, 2, 8))
    ),
    *(
        (
            borrow_triton.borrow_kernel,
            dict.fromkeys(("share", "multiplicity", "copies", "lenders", "notes"), INTS),
            {"MOST": most, "LEAST_PART": 20, "LANES": lanes, "EXPERTS": experts, "COLUMNS": columns},
            warps,
        )
        for most, lanes, experts, columns, warps in (
            (1, 64, 32, 16, 8),
            (2, 16, 32, 16, 2),
            (2, 256, 8, 4, 8),
        )
    ),
    (
        address_triton.count_blocks_kernel,
        {"topk_idx": LONGS, "counts": INTS, "firsts": INTS},
        {"BLOCK": 1024, "BINS": 512},
        4,
    ),
    (
        address_triton.scan_blocks_kernel,
        {"counts": INTS, "firsts": INTS},
        {"BINS": 512, "PART": 16, "CHUNK": 128},
        4,
    ),
    (
        address_triton.address_kernel,
        {"topk_idx": LONGS} | dict.fromkeys(("shifts", "kept", "send_until", "base", "hosts", "rows"), INTS),
        {"STEPS": 11, "BLOCK": 1024, "BINS": 512},
        4,
    ),
    (
        move_triton.push_rows_kernel,
        {"source": ROWS, "peers": LONGS, "weights": WIDE, "peer_weights": LONGS, **PLACES},
        {**MOVE, "DTYPE": tl.bfloat16},
        4,
    ),
    (
        move_triton.push_rows_kernel,
        {"source": ROWS, "peers": ROWS, **PLACES},
        {**MOVE, "LOCAL": True, "weights": None, "peer_weights": None, "DTYPE": tl.bfloat16},
        4,
    ),
    (
        move_triton.push_rows_kernel,
        {"source": LONGS, "peers": LONGS, "weights": LONGS, "peer_weights": LONGS, **PLACES},
        {**MOVE, "INDIRECT": True, "DTYPE": tl.bfloat16},
        4,
    ),
    (
        move_triton.pull_rows_kernel,
        {"peers": LONGS, "weights": WIDE, "out": ROWS, **PLACES},
        {**MOVE, "DTYPE": tl.bfloat16, "TOKENS": 2, "BLOCK": 1024},
        4,
    ),
    (
        move_triton.pull_rows_kernel,
        {"peers": LONGS, "weights": LONGS, "out": LONGS, **PLACES},
        {**MOVE, "INDIRECT": True, "DTYPE": tl.bfloat16, "TOKENS": 2, "BLOCK": 1024},
        4,
    ),
    (
        move_triton.pull_scalars_kernel,
        {"peers": LONGS, "out": WIDE, **PLACES},
        {"LOCAL": False, "INDIRECT": False, "BLOCK": 256},
        4,
    ),
    (
        indirect_triton.point_kernel,
        {"cells": LONGS, "source_0": LONGS, "target_0": LONGS, "source_1": WIDE, "target_1": WIDE}
        | dict.fromkeys(("address_0", "address_1", "address_2", "address_3"), "i64"),
        {"source_2": None, "target_2": None, "NUM_TENSORS": 4, "BLOCK": 1024},
        4,
    ),
    (
        move_triton.clear_padding_kernel,
        {"rows": ROWS, "starts": INTS, "ends": INTS},
        {"PARTS": 8, "BLOCK": 2048},
        4,
    ),
    (barrier_triton.barrier_kernel, {"pads": LONGS, "epochs": INTS}, {"LANES": 8}, 4),
    (barrier_triton.arrive_kernel, {"pads": LONGS, "epochs": INTS}, {"LANES": 8}, 4),
    (barrier_triton.wait_kernel, {"pads": LONGS, "epochs": INTS}, {"LANES": 8}, 4),
    (
        barrier_triton.exchange_counts_kernel,
        {"counts": INTS, "peer_counts": LONGS, "pads": LONGS, "epochs": INTS},
        {"LANES": 8, "BINS": 256},
        4,
    ),
]


@pytest.mark.parametrize("target", EACH_TARGET)
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case[0].__name__)
def test_kernels_compile_everywhere(case: tuple, target: str, tmp_path: Path) -> None:
    kernel, types, constants, warps = case
    compiled = compile_kernel(kernel, types, constants, warps, TARGETS[target])
    assert spill_bytes(compiled, tmp_path) <= MAX_SPILL_BYTES


def ptx_of(name: str, target: str = "sm_90", **wanted: Any) -> str:
    """PTX of the first entry of that name and constants, with everything on 16 bytes that is so at run time."""
    named = (case for case in KERNELS if case[0].__name__ == name)
    kernel, types, constants, warps = next(case for case in named if wanted.items() <= case[2].items())
    divisible = tuple(n for n in kernel.arg_names if types.get(n, "").startswith("*") or n in ("D", "out_stride"))
    return compile_kernel(kernel, types, constants, warps, TARGETS[target], divisible).asm["ptx"]


@pytest.mark.parametrize("indirect", [False, True])
def test_rows_move_in_16_bytes(indirect: bool) -> None:
    """Peers' addresses are loaded, so Triton cannot know that they are aligned; those of tokens are where indirect."""
    for name in ("push_rows_kernel", "pull_rows_kernel"):
        ptx = ptx_of(name, INDIRECT=indirect)
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx


def test_signals_are_ordered_between_gpus() -> None:
    ptx = ptx_of("barrier_kernel")
    assert "atom.global.sys.release.exch.b32" in ptx or "atom.sys.release.global.exch.b32" in ptx
    assert "atom.global.sys.acquire.add" in ptx or "atom.sys.acquire.global.add" in ptx


def test_every_kernel_is_compiled() -> None:
    """A new `*_kernel` must join the list above."""
    modules = (address_triton, barrier_triton, borrow_triton, indirect_triton, move_triton, plan_triton, split_triton)
    known = {case[0].__name__ for case in KERNELS}
    assert known == {name for module in modules for name in vars(module) if name.endswith("_kernel")}
