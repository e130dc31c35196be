"""Rows to their places in peers' memory and back, in token order: each token is read or written once. No atomics.

`peers` lists raw addresses of buffers that this process can reach, one for each rank, or with LOCAL is one buffer of
this process. With INDIRECT, the tensors of this rank's tokens are reached by addresses in device memory too.

Shape legend: T tokens, k choices, D width of a row, N ranks, P padded rows, R residents.
"""

import triton
import triton.language as tl

from lightning_swiftmoe.kernels.indirect_triton import pointer_from, pointer_of


@triton.jit
def _starts_of_rows(peers, host, row, D, LOCAL: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers to the first element of each row; without meaning where the row is -1."""
    if LOCAL:
        base = peers + tl.zeros_like(row)
    else:
        base = pointer_from(tl.load(peers + host, mask=host >= 0, other=0), DTYPE)
    return base + row.to(tl.int64) * D


@triton.jit(do_not_specialize=["num_tokens"])
def push_rows_kernel(
    source, hosts, rows, peers, weights, peer_weights, num_tokens, D,
    LOCAL: tl.constexpr, INDIRECT: tl.constexpr, ELEMENT: tl.constexpr, WEIGHT: tl.constexpr, DTYPE: tl.constexpr,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `rows[t, j]` of host `hosts[t, j]` becomes `source[t]`, with the cast, and its weight `weights[t, j]`."""
    source = pointer_of(source, INDIRECT, ELEMENT)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    if weights is not None:
        weights = pointer_of(weights, INDIRECT, WEIGHT)
        for choice in tl.static_range(TOP_K):
            at = token * TOP_K + choice
            host = tl.load(hosts + at, mask=live, other=-1)
            row = tl.load(rows + at, mask=live, other=-1)
            weight = tl.load(weights + at, mask=live, other=0.0).to(tl.float32)
            base = tl.load(peer_weights + host, mask=host >= 0, other=0).to(tl.pointer_type(tl.float32))
            tl.store(base + row, weight, mask=host >= 0)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < D)[None, :]
        value = tl.load(source + token[:, None] * D + cols[None, :], mask=live[:, None] & inside, other=0.0)
        value = value.to(DTYPE)
        for choice in tl.static_range(TOP_K):
            at = token * TOP_K + choice
            host = tl.load(hosts + at, mask=live, other=-1)
            row = tl.load(rows + at, mask=live, other=-1)
            first = _starts_of_rows(peers, host, row, D, LOCAL, DTYPE)
            tl.store(first[:, None] + cols[None, :], value, mask=(host >= 0)[:, None] & inside)


@triton.jit(do_not_specialize=["num_tokens"])
def pull_rows_kernel(
    hosts, rows, peers, weights, out, num_tokens, D, out_stride,
    LOCAL: tl.constexpr, INDIRECT: tl.constexpr, ELEMENT: tl.constexpr, WEIGHT: tl.constexpr, DTYPE: tl.constexpr,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out[t] = sum_j weights[t, j] * row[t, j]` in fp32, in the order of j; -1 adds nothing."""
    out = pointer_of(out, INDIRECT, ELEMENT)
    if weights is not None:
        weights = pointer_of(weights, INDIRECT, WEIGHT)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = token < num_tokens
    inside = (cols < D)[None, :]
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        at = token * TOP_K + choice
        host = tl.load(hosts + at, mask=live, other=-1)
        row = tl.load(rows + at, mask=live, other=-1)
        first = _starts_of_rows(peers, host, row, D, LOCAL, DTYPE)
        value = tl.load(first[:, None] + cols[None, :], mask=(host >= 0)[:, None] & inside, other=0.0)
        value = value.to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + at, mask=live, other=0.0).to(tl.float32)[:, None]
        total += value
    target = out + token[:, None] * out_stride + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit(do_not_specialize=["num_assignments", "num_parts", "part_stride"])
def pull_scalars_kernel(
    hosts, rows, peers, out, num_assignments, num_parts, part_stride,
    LOCAL: tl.constexpr, INDIRECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out[a] = sum_n part n of the row's scalar`, in the order of n; zero where the assignment was dropped."""
    out = pointer_of(out, INDIRECT, tl.float32)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    host = tl.load(hosts + at, mask=at < num_assignments, other=-1)
    row = tl.load(rows + at, mask=at < num_assignments, other=-1)
    scalar = _starts_of_rows(peers, host, row, 1, LOCAL, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, num_parts):
        total += tl.load(scalar, mask=host >= 0, other=0.0)
        scalar += part_stride
    tl.store(out + at, total, mask=at < num_assignments)


@triton.jit
def clear_padding_kernel(rows, starts, ends, D, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in rows `[ends[r], starts[r + 1])`; PARTS programs share a resident."""
    resident = tl.program_id(0) // PARTS
    first = tl.load(ends + resident) + tl.program_id(0) % PARTS
    target = rows + first.to(tl.int64) * D
    for _ in range(first, tl.load(starts + resident + 1), PARTS):
        for start in range(0, D, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(target + cols, tl.zeros([BLOCK], rows.dtype.element_ty), mask=cols < D)
        target += PARTS * D
