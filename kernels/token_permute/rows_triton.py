"""Rows to expert order and back: spread with zeroed padding, and the weighted gather-sum. No atomics."""

import triton
import triton.language as tl


@triton.jit
def _copy_tokens(
    source, inverse, rows, block, num_tokens, D, TOP_K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    token = block * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    wide = token.to(tl.int64)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < D)[None, :]
        value = tl.load(source + wide[:, None] * D + cols[None, :], mask=live[:, None] & inside, other=0.0)
        for choice in tl.static_range(TOP_K):
            row = tl.load(inverse + wide * TOP_K + choice, mask=live, other=-1)
            target = rows + row.to(tl.int64)[:, None] * D + cols[None, :]
            tl.store(target, value, mask=(row >= 0)[:, None] & inside)


@triton.jit
def _clear_padding(starts, ends, rows, part, D, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    expert = part // PARTS
    first = tl.load(ends + expert) + part % PARTS
    target = rows + first.to(tl.int64) * D
    for _ in range(first, tl.load(starts + expert + 1), PARTS):
        for start in range(0, D, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(target + cols, tl.zeros([BLOCK], rows.dtype.element_ty), mask=cols < D)
        target += PARTS * D


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def spread_rows_kernel(
    source, inverse, starts, ends, rows, num_tokens, num_blocks, D,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rows[inverse[t, j]] = source[t]`, zeros in the padding.

    In token order, each source row is read once and written k times; in row order it would be read k times, from
    memory, since the source is larger than the cache. The programs past `num_blocks` clear the padding.
    """
    block = tl.program_id(0)
    if block < num_blocks:
        _copy_tokens(source, inverse, rows, block, num_tokens, D, TOP_K, TOKENS, BLOCK)
    else:
        _clear_padding(starts, ends, rows, block - num_blocks, D, PARTS, BLOCK)


@triton.jit(do_not_specialize=["num_assignments", "part_stride"])
def router_grad_kernel(partials, inverse, grad_weights, num_assignments, num_parts, part_stride, BLOCK: tl.constexpr):
    """`grad_weights[a] = sum_n partials[n, inverse[a]]` in the order of n; zero where the assignment was dropped."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse + at, mask=at < num_assignments, other=-1)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, num_parts):
        total += tl.load(partials + row, mask=row >= 0, other=0.0)
        partials += part_stride
    tl.store(grad_weights + at, total.to(grad_weights.dtype.element_ty), mask=at < num_assignments)


@triton.jit(do_not_specialize=["part_stride"], do_not_specialize_on_alignment=["num_rows"])
def sum_partials_kernel(partials, num_rows, total, num_parts, part_stride, BLOCK: tl.constexpr):
    """`total[p] = sum_n partials[n, p]` in the order of n, for the rows in use."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < tl.load(num_rows)
    value = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, num_parts):
        value += tl.load(partials + row, mask=live, other=0.0)
        partials += part_stride
    tl.store(total + row, value, mask=live)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_rows_kernel(
    rows,
    inverse,
    weights,
    out,
    num_tokens,
    D,
    out_stride,
    WEIGHTED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out[t, :D] = sum_j weights[t, j] * rows[inverse[t, j]]` in fp32, in the order of j; -1 adds nothing."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = token < num_tokens
    wide = token.to(tl.int64)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(inverse + wide * TOP_K + choice, mask=live, other=-1)
        mask = (row >= 0)[:, None] & (cols < D)[None, :]
        value = tl.load(rows + row.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + wide * TOP_K + choice, mask=live, other=0.0).to(tl.float32)[:, None]
        total += value
    target = out + wide[:, None] * out_stride + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & (cols < D)[None, :])
