"""Portable grouped GEMMs in Triton, for every dtype and every target: the path where the Hopper kernels do not apply.

Rows stand in the padded layout of `padded_routing.py`, so a row tile has one expert. Plain-torch twin: `grouped.py`.

Shape legend: P padded rows, E experts, K depth, N columns, M rows of a weight gradient.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
def rows_gemm_portable_kernel(
    rows, weight, out, tile_expert, num_rows, K, N, stride_expert, stride_k, stride_n,
    TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[p] = rows[p] @ weight[expert of p]` for `rows[P, K]`, `out[P, N]`. Grid: row tiles, column tiles."""
    tile = tl.program_id(0)
    if tile * TILE >= tl.load(num_rows):
        return
    row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    base = weight + tl.load(tile_expert + tile).to(tl.int64) * stride_expert
    acc = tl.zeros([TILE, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + depth
        a = tl.load(rows + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        b = tl.load(
            base + k.to(tl.int64)[:, None] * stride_k + cols.to(tl.int64)[None, :] * stride_n,
            mask=(k < K)[:, None] & (cols < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    target = out + row[:, None] * N + cols[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(cols < N)[None, :])


@triton.jit
def weight_gemm_portable_kernel(
    left, right, out, starts, ends, M, N,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[e] = left[rows of e].T @ right[rows of e]` for `left[P, M]`, `right[P, N]`. Grid: experts, M and N tiles."""
    expert = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    last = tl.load(ends + expert)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(tl.load(starts + expert), last, BK):
        row = start + tl.arange(0, BK)
        live = row < last
        a = tl.load(left + row.to(tl.int64)[None, :] * M + m[:, None], mask=live[None, :] & (m < M)[:, None], other=0.0)
        b = tl.load(
            right + row.to(tl.int64)[:, None] * N + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    target = out + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
