"""Rows to expert order and back: gather with zeroed padding, and the weighted gather-sum. No atomics."""

import triton
import triton.language as tl


@triton.jit
def gather_rows_kernel(
    source, row_assignment, num_rows, rows, D, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """`rows[p] = source[row_assignment[p] // TOP_K]`, zeros where the assignment is -1. Grid: blocks of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    limit = tl.load(num_rows)
    if tl.program_id(0) * ROWS >= limit:
        return
    assignment = tl.load(row_assignment + row, mask=row < limit, other=-1)
    token = (assignment // TOP_K).to(tl.int64)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < D
        value = tl.load(
            source + token[:, None] * D + cols[None, :], mask=(assignment >= 0)[:, None] & inside[None, :], other=0.0
        )
        target = rows + row.to(tl.int64)[:, None] * D + cols[None, :]
        tl.store(target, value, mask=(row < limit)[:, None] & inside[None, :])


@triton.jit
def combine_rows_kernel(
    rows,
    inverse,
    weights,
    out,
    num_tokens,
    row_stride,
    out_stride,
    D,
    WEIGHTED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out[t] = sum_j weights[t, j] * rows[inverse[t, j]]` in fp32, in the order of j; -1 adds nothing."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = token < num_tokens
    wide = token.to(tl.int64)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(inverse + wide * TOP_K + choice, mask=live, other=-1)
        mask = (row >= 0)[:, None] & (cols < D)[None, :]
        value = tl.load(rows + row.to(tl.int64)[:, None] * row_stride + cols[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + wide * TOP_K + choice, mask=live, other=0.0).to(tl.float32)[:, None]
        total += value
    target = out + wide[:, None] * out_stride + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & (cols < D)[None, :])
