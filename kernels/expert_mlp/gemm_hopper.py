"""Warp-specialised grouped GEMMs for Hopper, in Gluon: producer warps feed shared memory, two warpgroups run wgmma.

Rows stand in expert order, each expert padded to whole tiles of `BLOCK_M` rows (see `padded_routing.py`), so no tile
straddles an expert and every store is a full TMA box. An operand that stands in token order (`x`, the gradient of `y`)
is gathered on its way into shared memory, by `order[p]`, the assignment of row p or -1 for padding; it is never written
in expert order. Persistent, one program per multiprocessor, or in short rounds (`_turns`), without a host sync: the
number of tiles is read from device memory. Plain-torch twin: `grouped.py` with `activations.py`.

Shape legend: T tokens, P padded rows, E experts, K depth, N columns; `BN` is `BLOCK_N`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lightning_swiftmoe.kernels.expert_mlp.activations_triton import act_both_ptx, act_value_ptx

# Renamed between Triton 3.6 and 3.9; the semantics are the same.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BLOCK_M = 128
BLOCK_N = 256
BLOCK_K = 64
HALF_N = 128


@gluon.jit
def _turns(total, stride, span):
    """This program's first tile, and the end of its tiles, which stand `stride` apart.

    Programs come in rounds of `stride`; a round takes the next `span` tiles. One round with all of them is a persistent
    grid; short rounds let the hardware place programs as multiprocessors become free.
    """
    program = gl.program_id(0)
    base = program // stride * span
    return base + program % stride, gl.minimum(base + span, total)


@gluon.jit
def _tile(index, num_m, num_n, GROUP_M: gl.constexpr):
    """Row and column tile of a linear index: bands of GROUP_M row tiles, so that a wave is nearly square in bytes."""
    band = GROUP_M * num_n
    first_m = (index // band) * GROUP_M
    height = gl.minimum(num_m - first_m, GROUP_M)
    inside = index % band
    return first_m + inside % height, inside // height


@gluon.jit
def _split(acc):
    """Left and right column halves of an accumulator, in registers."""
    half: gl.constexpr = acc.shape[1] // 2
    return acc.reshape([acc.shape[0], 2, half]).permute((0, 2, 1)).split()


@gluon.jit
def _rows_producer(
    a_desc, b_desc, a_bufs, b_bufs, ready, empty, tile_expert, num_rows, K, N, gate_rows, b_rows, stride, span,
    NT: gl.constexpr, GATED: gl.constexpr, GROUP_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    OUT_N: gl.constexpr = BN // 2 if GATED else BN
    num_m = gl.load(num_rows) // BM
    num_n = (N + OUT_N - 1) // OUT_N
    slot = 0
    phase = 1
    first, last_tile = _turns(num_m * num_n, stride, span)
    for index in range(first, last_tile, stride):
        tile_m, tile_n = _tile(index, num_m, num_n, GROUP_M)
        b_row = gl.load(tile_expert + tile_m) * b_rows
        for k in range(0, K, BK):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, (BM + BN) * BK * 2)
            _tma_load(a_desc, [tile_m * BM, k], bar, a_bufs.index(slot))
            if NT:
                if GATED:
                    buf = b_bufs.index(slot)
                    _tma_load(b_desc, [b_row + tile_n * OUT_N, k], bar, buf.slice(0, OUT_N))
                    _tma_load(b_desc, [b_row + gate_rows + tile_n * OUT_N, k], bar, buf.slice(OUT_N, OUT_N))
                else:
                    _tma_load(b_desc, [b_row + tile_n * BN, k], bar, b_bufs.index(slot))
            else:
                _tma_load(b_desc, [b_row + k, tile_n * BN], bar, b_bufs.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _gather(source, assignment, col, buf, WIDTH, bar, TOP_K: gl.constexpr, layout: gl.constexpr):
    """Start copying `source[assignment // TOP_K, col : col + columns of buf]`; zeros where assignment is negative.

    `source` has rows of WIDTH elements, a multiple of 16. Every thread arrives at `bar` once its copies are complete.
    """
    WIDTH = gl.multiple_of(WIDTH, 16)
    cols = col + gl.arange(0, buf.shape[1], layout=gl.SliceLayout(0, layout))
    rows = gl.expand_dims((assignment // TOP_K).to(gl.int64), 1)
    live = gl.expand_dims(assignment >= 0, 1) & gl.expand_dims(cols < WIDTH, 0)
    _copy(buf, source + rows * WIDTH + gl.expand_dims(cols, 0), mask=live)
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _gathered_rows_producer(
    x, order, b_desc, a_bufs, b_bufs, ready, empty, tile_expert, num_rows, K, N, gate_rows, b_rows, stride, span,
    TOP_K: gl.constexpr, NT: gl.constexpr, GATED: gl.constexpr, GROUP_M: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, COPIERS: gl.constexpr,
):  # fmt: skip
    """`_rows_producer` for an A in token order."""
    OUT_N: gl.constexpr = BN // 2 if GATED else BN
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [COPIERS, 1], [1, 0])
    num_m = gl.load(num_rows) // BM
    num_n = (N + OUT_N - 1) // OUT_N
    slot = 0
    phase = 1
    first, last_tile = _turns(num_m * num_n, stride, span)
    for index in range(first, last_tile, stride):
        tile_m, tile_n = _tile(index, num_m, num_n, GROUP_M)
        b_row = gl.load(tile_expert + tile_m) * b_rows
        assignment = gl.load(order + tile_m * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, layout)))
        for k in range(0, K, BK):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, BN * BK * 2)
            if NT:
                if GATED:
                    buf = b_bufs.index(slot)
                    _tma_load(b_desc, [b_row + tile_n * OUT_N, k], bar, buf.slice(0, OUT_N))
                    _tma_load(b_desc, [b_row + gate_rows + tile_n * OUT_N, k], bar, buf.slice(OUT_N, OUT_N))
                else:
                    _tma_load(b_desc, [b_row + tile_n * BN, k], bar, b_bufs.index(slot))
            else:
                _tma_load(b_desc, [b_row + k, tile_n * BN], bar, b_bufs.index(slot))
            _gather(x, assignment, k, a_bufs.index(slot), K, bar, TOP_K, layout)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _rows_consumer(
    pre_desc, out_desc, a_bufs, b_bufs, c_bufs, ready, empty, num_rows, K, N, gate_rows, stride, span,
    TOP_K: gl.constexpr, NT: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, GROUP_M: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BN // 2
    OUT_N: gl.constexpr = HALF if GATED else BN
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    dtype: gl.constexpr = out_desc.dtype
    num_m = gl.load(num_rows) // BM
    num_n = (N + OUT_N - 1) // OUT_N
    slot = 0
    phase = 0
    first, last_tile = _turns(num_m * num_n, stride, span)
    for index in range(first, last_tile, stride):
        tile_m, tile_n = _tile(index, num_m, num_n, GROUP_M)
        row = tile_m * BM
        acc = gl.zeros([BM, BN], gl.float32, acc_layout)
        last = 0
        for k in range(0, K, BK):
            mbarrier.wait(ready.index(slot), phase)
            if TOP_K > 0:
                fence_async_shared()  # the gather wrote as threads write, wgmma reads as TMA does
            b_buf = b_bufs.index(slot)
            if NT:
                b_buf = b_buf.permute((1, 0))
            token = warpgroup_mma(a_bufs.index(slot), b_buf, acc, use_acc=k > 0, is_async=True)
            # At most one product in flight: the buffers of the one before it are free.
            acc = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(empty.index(last), count=1, pred=k > 0)
            last = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)

        left, right = _split(acc)
        tma.store_wait(0)
        if ACT < 0:
            c_bufs.index(0).store(left.to(dtype))
            c_bufs.index(1).store(right.to(dtype))
            fence_async_shared()
            _tma_store(out_desc, [row, tile_n * BN], c_bufs.index(0))
            _tma_store(out_desc, [row, tile_n * BN + HALF], c_bufs.index(1))
        else:
            col = tile_n * OUT_N
            right_col = gate_rows + col if GATED else col + HALF
            c_bufs.index(0).store(left.to(dtype))
            c_bufs.index(1).store(right.to(dtype))
            fence_async_shared()
            _tma_store(pre_desc, [row, col], c_bufs.index(0))
            _tma_store(pre_desc, [row, right_col], c_bufs.index(1))
            if GATED:
                hidden = (act_value_ptx(left, ACT) * right).to(dtype)
                tma.store_wait(1)
                c_bufs.index(0).store(hidden)
                fence_async_shared()
                _tma_store(out_desc, [row, col], c_bufs.index(0))
            else:
                hidden = act_value_ptx(left, ACT).to(dtype)
                tma.store_wait(1)
                c_bufs.index(0).store(hidden)
                fence_async_shared()
                _tma_store(out_desc, [row, col], c_bufs.index(0))
                hidden = act_value_ptx(right, ACT).to(dtype)
                tma.store_wait(1)
                c_bufs.index(1).store(hidden)
                fence_async_shared()
                _tma_store(out_desc, [row, right_col], c_bufs.index(1))
    tma.store_wait(0)


@gluon.jit
def _barriers(STAGES: gl.constexpr, COPIERS: gl.constexpr):
    """Per stage: `ready`, at which the TMA issuer and every gathering thread arrive, and `empty`."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1 + 32 * COPIERS)
        mbarrier.init(empty.index(i), count=1)
    return ready, empty


@gluon.jit(do_not_specialize=["stride", "span"], do_not_specialize_on_alignment=["num_rows"])
def rows_gemm_kernel(
    a, order, b_desc, pre_desc, out_desc, tile_expert, num_rows, K, N, gate_rows, b_rows, stride, span,
    TOP_K: gl.constexpr, NT: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, GROUP_M: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    COPIERS: gl.constexpr,
):  # fmt: skip
    """`out[p] = A[p] @ B[expert of p]`, or with ACT >= 0 `pre = A @ B` and `out = act(pre)`.

    With TOP_K == 0, `a` describes `A[P, K]`; else it points to `[T, K]` and `A[p] = a[order[p] // TOP_K]`. B is the
    `[E, b_rows, .]` weights seen as two dims: `[E * N', K]` when NT, `[E * K, N]` when not. When GATED, the tile's left
    half is gate columns and its right half the up columns `gate_rows` further down.
    """
    dtype: gl.constexpr = out_desc.dtype
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], a_layout)
    if NT:
        b_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], b_desc.layout)
    else:
        b_bufs = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], b_desc.layout)
    c_bufs = gl.allocate_shared_memory(dtype, [2, BM, BN // 2], out_desc.layout)
    ready, empty = _barriers(STAGES, COPIERS if TOP_K > 0 else 0)
    fence_async_shared()
    if TOP_K > 0:
        gl.warp_specialize([
            (_rows_consumer, (pre_desc, out_desc, a_bufs, b_bufs, c_bufs, ready, empty, num_rows, K, N, gate_rows,
                              stride, span, TOP_K, NT, GATED, ACT, GROUP_M, BM, BN, BK, STAGES, WARPS)),
            (_gathered_rows_producer, (a, order, b_desc, a_bufs, b_bufs, ready, empty, tile_expert, num_rows, K, N,
                                       gate_rows, b_rows, stride, span, TOP_K, NT, GATED, GROUP_M, BM, BN, BK, STAGES,
                                       COPIERS)),
        ], [COPIERS], [40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_rows_consumer, (pre_desc, out_desc, a_bufs, b_bufs, c_bufs, ready, empty, num_rows, K, N, gate_rows,
                              stride, span, TOP_K, NT, GATED, ACT, GROUP_M, BM, BN, BK, STAGES, WARPS)),
            (_rows_producer, (a, b_desc, a_bufs, b_bufs, ready, empty, tile_expert, num_rows, K, N, gate_rows,
                              b_rows, stride, span, NT, GATED, GROUP_M, BM, BN, BK, STAGES)),
        ], [1], [24])  # fmt: skip


@gluon.jit
def _load_pre(pre_desc, bufs, bars, row, col, gate_rows, SIDE: gl.constexpr, GATED: gl.constexpr):
    """Start loading a chunk of pre-activations: gate (and up) columns into side SIDE of the buffers."""
    PER: gl.constexpr = 2 if GATED else 1
    bar = bars.index(SIDE)
    mbarrier.expect(bar, PER * pre_desc.block_type.shape[0] * pre_desc.block_type.shape[1] * 2)
    _tma_load(pre_desc, [row, col], bar, bufs.index(SIDE * PER))
    if GATED:
        _tma_load(pre_desc, [row, gate_rows + col], bar, bufs.index(SIDE * PER + 1))


@gluon.jit
def _grad_chunk(
    grad, scale, bufs, scaled_buf, bars, phase, grad_pre_desc, scaled_desc, row, col, N, gate_rows,
    SIDE: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """Activation backward of one chunk of columns, in place of its pre-activations; returns `<grad, act>` per row."""
    PER: gl.constexpr = 2 if GATED else 1
    layout: gl.constexpr = grad.type.layout
    dtype: gl.constexpr = scaled_desc.dtype
    wide_scale = gl.expand_dims(scale, 1)
    mbarrier.wait(bars.index(SIDE), phase)
    value, slope = act_both_ptx(bufs.index(SIDE * PER).load(layout).to(gl.float32), ACT)
    scaled_grad = wide_scale * grad
    grad_z = scaled_grad * slope
    if GATED:
        up = bufs.index(SIDE * PER + 1).load(layout).to(gl.float32)
        bufs.index(SIDE * PER + 1).store((scaled_grad * value).to(dtype))
        grad_z *= up
        value *= up
    bufs.index(SIDE * PER).store(grad_z.to(dtype))
    scaled_buf.store((wide_scale * value).to(dtype))
    fence_async_shared()
    if col < N:
        _tma_store(grad_pre_desc, [row, col], bufs.index(SIDE * PER))
        if GATED:
            _tma_store(grad_pre_desc, [row, gate_rows + col], bufs.index(SIDE * PER + 1))
        _tma_store(scaled_desc, [row, col], scaled_buf)
    return gl.sum(grad * value, axis=1)


@gluon.jit
def _grad_consumer(
    pre_desc, grad_pre_desc, scaled_desc, a_bufs, b_bufs, pre_bufs, scaled_buf, ready, empty, pre_bars, weights, order,
    partials, num_rows, K, N, gate_rows, part_stride, stride, span,
    TOP_K: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, GROUP_M: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = BN // 4
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    num_m = gl.load(num_rows) // BM
    num_n = (N + BN - 1) // BN
    slot = 0
    phase = 0
    first, last_tile = _turns(num_m * num_n, stride, span)
    for index in range(first, last_tile, stride):
        tile_m, tile_n = _tile(index, num_m, num_n, GROUP_M)
        row = tile_m * BM
        col = tile_n * BN
        tma.store_wait(0)
        _load_pre(pre_desc, pre_bufs, pre_bars, row, col, gate_rows, 0, GATED)
        _load_pre(pre_desc, pre_bufs, pre_bars, row, col + WIDTH, gate_rows, 1, GATED)
        acc = gl.zeros([BM, BN], gl.float32, acc_layout)
        half, _ = _split(acc)
        quarter, _ = _split(half)
        rows = row + gl.arange(0, BM, layout=gl.SliceLayout(1, quarter.type.layout))
        # Before the product, which hides both loads.
        assignment = gl.load(order + rows)
        scale = gl.load(weights + assignment, mask=assignment >= 0, other=0.0).to(gl.float32)
        last = 0
        for k in range(0, K, BK):
            mbarrier.wait(ready.index(slot), phase)
            if TOP_K > 0:
                fence_async_shared()  # as in `_rows_consumer`
            token = warpgroup_mma(a_bufs.index(slot), b_bufs.index(slot), acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(empty.index(last), count=1, pred=k > 0)
            last = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)

        left, right = _split(acc)
        c0, c1 = _split(left)
        c2, c3 = _split(right)
        total = _grad_chunk(c0, scale, pre_bufs, scaled_buf, pre_bars, 0, grad_pre_desc, scaled_desc, row, col, N,
                            gate_rows, 0, GATED, ACT)  # fmt: skip
        tma.store_wait(0)
        _load_pre(pre_desc, pre_bufs, pre_bars, row, col + 2 * WIDTH, gate_rows, 0, GATED)
        total += _grad_chunk(c1, scale, pre_bufs, scaled_buf, pre_bars, 0, grad_pre_desc, scaled_desc, row,
                             col + WIDTH, N, gate_rows, 1, GATED, ACT)  # fmt: skip
        tma.store_wait(0)
        _load_pre(pre_desc, pre_bufs, pre_bars, row, col + 3 * WIDTH, gate_rows, 1, GATED)
        total += _grad_chunk(c2, scale, pre_bufs, scaled_buf, pre_bars, 1, grad_pre_desc, scaled_desc, row,
                             col + 2 * WIDTH, N, gate_rows, 0, GATED, ACT)  # fmt: skip
        tma.store_wait(0)
        total += _grad_chunk(c3, scale, pre_bufs, scaled_buf, pre_bars, 1, grad_pre_desc, scaled_desc, row,
                             col + 3 * WIDTH, N, gate_rows, 1, GATED, ACT)  # fmt: skip
        gl.store(partials + tile_n.to(gl.int64) * part_stride + rows, total)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["part_stride", "stride", "span"], do_not_specialize_on_alignment=["num_rows"])
def hidden_grad_kernel(
    grad_y, order, b_desc, pre_desc, grad_pre_desc, scaled_desc, weights, partials, tile_expert, num_rows, K, N,
    gate_rows, b_rows, part_stride, stride, span,
    TOP_K: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, GROUP_M: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, COPIERS: gl.constexpr,
):  # fmt: skip
    """`grad = A @ B[e]` and, from its accumulators, the backward of `s * act(pre)`; see `activation_backward`.

    `A[p] = grad_y[order[p] // TOP_K]` for `grad_y[T, K]`, or with TOP_K == 0 `grad_y` describes `A[P, K]`;
    `s[p] = weights[order[p]]`. Both are zero in the padding. B is the down projection `[E * K, N]`. `partials[n, P]`
    gets `<grad, act>` over the columns of tile n. Pre-activations come in chunks of `BN / 4` columns, the first two
    while the product runs; `grad_pre` may be in the memory of `pre`.
    """
    dtype: gl.constexpr = scaled_desc.dtype
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], a_layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], b_desc.layout)
    pre_bufs = gl.allocate_shared_memory(dtype, [4 if GATED else 2, BM, BN // 4], pre_desc.layout)
    scaled_buf = gl.allocate_shared_memory(dtype, [BM, BN // 4], pre_desc.layout)
    ready, empty = _barriers(STAGES, COPIERS if TOP_K > 0 else 0)
    pre_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(pre_bars.index(i), count=1)
    fence_async_shared()
    if TOP_K > 0:
        gl.warp_specialize([
            (_grad_consumer, (pre_desc, grad_pre_desc, scaled_desc, a_bufs, b_bufs, pre_bufs, scaled_buf, ready, empty,
                              pre_bars, weights, order, partials, num_rows, K, N, gate_rows, part_stride,
                              stride, span, TOP_K, GATED, ACT, GROUP_M, BM, BN, BK, STAGES, WARPS)),
            (_gathered_rows_producer, (grad_y, order, b_desc, a_bufs, b_bufs, ready, empty, tile_expert, num_rows, K,
                                       N, gate_rows, b_rows, stride, span, TOP_K, False, False, GROUP_M, BM, BN, BK,
                                       STAGES, COPIERS)),
        ], [COPIERS], [40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_grad_consumer, (pre_desc, grad_pre_desc, scaled_desc, a_bufs, b_bufs, pre_bufs, scaled_buf, ready, empty,
                              pre_bars, weights, order, partials, num_rows, K, N, gate_rows, part_stride,
                              stride, span, TOP_K, GATED, ACT, GROUP_M, BM, BN, BK, STAGES, WARPS)),
            (_rows_producer, (grad_y, b_desc, a_bufs, b_bufs, ready, empty, tile_expert, num_rows, K, N, gate_rows,
                              b_rows, stride, span, False, False, GROUP_M, BM, BN, BK, STAGES)),
        ], [1], [24])  # fmt: skip


@gluon.jit
def _depth(starts, ends, expert, BK: gl.constexpr):
    """First row of an expert, and how many blocks of BK rows cover its real rows."""
    start = gl.load(starts + expert)
    return start, (gl.load(ends + expert) - start + BK - 1) // BK


@gluon.jit
def _weight_producer(
    a_desc, b_desc, a_bufs, b_bufs, ready, empty, starts, ends, num_experts, M, N, stride, span,
    GROUP_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    num_m = (M + BM - 1) // BM
    num_n = (N + BN - 1) // BN
    per_expert = num_m * num_n
    slot = 0
    phase = 1
    first, last_tile = _turns(num_experts * per_expert, stride, span)
    for index in range(first, last_tile, stride):
        expert = index // per_expert
        tile_m, tile_n = _tile(index % per_expert, num_m, num_n, GROUP_M)
        start, depth = _depth(starts, ends, expert, BK)
        for i in range(0, depth):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, (BM + BN) * BK * 2)
            _tma_load(a_desc, [start + i * BK, tile_m * BM], bar, a_bufs.index(slot))
            _tma_load(b_desc, [start + i * BK, tile_n * BN], bar, b_bufs.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _gathered_weight_producer(
    source, order, b_desc, a_bufs, b_bufs, ready, empty, starts, ends, num_experts, M, N, stride, span,
    TOP_K: gl.constexpr, GROUP_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, COPIERS: gl.constexpr,
):  # fmt: skip
    """`_weight_producer` for an A in token order."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BM, BM // 8], [COPIERS, 1], [1, 0])
    lanes = gl.arange(0, BK, layout=gl.SliceLayout(1, layout))
    num_m = (M + BM - 1) // BM
    num_n = (N + BN - 1) // BN
    per_expert = num_m * num_n
    slot = 0
    phase = 1
    first, last_tile = _turns(num_experts * per_expert, stride, span)
    for index in range(first, last_tile, stride):
        expert = index // per_expert
        tile_m, tile_n = _tile(index % per_expert, num_m, num_n, GROUP_M)
        start, depth = _depth(starts, ends, expert, BK)
        assignment = gl.load(order + start + lanes, mask=lanes < depth * BK, other=-1)
        for i in range(0, depth):
            row = start + i * BK
            # The next block's assignments travel while this block waits for a free buffer.
            following = gl.load(order + row + BK + lanes, mask=lanes < (depth - 1 - i) * BK, other=-1)
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, BN * BK * 2)
            _tma_load(b_desc, [row, tile_n * BN], bar, b_bufs.index(slot))
            _gather(source, assignment, tile_m * BM, a_bufs.index(slot), M, bar, TOP_K, layout)
            assignment = following
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _weight_consumer(
    out_desc, a_bufs, b_bufs, c_bufs, ready, empty, starts, ends, num_experts, M, N, stride, span,
    TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BN // 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    dtype: gl.constexpr = out_desc.dtype
    num_m = (M + BM - 1) // BM
    num_n = (N + BN - 1) // BN
    per_expert = num_m * num_n
    slot = 0
    phase = 0
    first, last_tile = _turns(num_experts * per_expert, stride, span)
    for index in range(first, last_tile, stride):
        expert = index // per_expert
        tile_m, tile_n = _tile(index % per_expert, num_m, num_n, GROUP_M)
        _, depth = _depth(starts, ends, expert, BK)
        acc = gl.zeros([BM, BN], gl.float32, acc_layout)
        last = 0
        for i in range(0, depth):
            mbarrier.wait(ready.index(slot), phase)
            if TOP_K > 0:
                fence_async_shared()
            token = warpgroup_mma(
                a_bufs.index(slot).permute((1, 0)), b_bufs.index(slot), acc, use_acc=i > 0, is_async=True
            )
            acc = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(empty.index(last), count=1, pred=i > 0)
            last = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1, pred=depth > 0)
        left, right = _split(acc)
        tma.store_wait(0)
        if TRANSPOSED:
            c_bufs.index(0).permute((1, 0)).store(left.to(dtype))
            c_bufs.index(1).permute((1, 0)).store(right.to(dtype))
            fence_async_shared()
            row = expert * N + tile_n * BN
            _tma_store(out_desc, [row, tile_m * BM], c_bufs.index(0))
            if tile_n * BN + HALF < N:
                _tma_store(out_desc, [row + HALF, tile_m * BM], c_bufs.index(1))
        else:
            c_bufs.index(0).store(left.to(dtype))
            c_bufs.index(1).store(right.to(dtype))
            fence_async_shared()
            row = expert * M + tile_m * BM
            _tma_store(out_desc, [row, tile_n * BN], c_bufs.index(0))
            _tma_store(out_desc, [row, tile_n * BN + HALF], c_bufs.index(1))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["stride", "span"])
def weight_gemm_kernel(
    a, order, b_desc, out_desc, starts, ends, num_experts, M, N, stride, span,
    TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, COPIERS: gl.constexpr,
):  # fmt: skip
    """`out[e] = A[rows of e].T @ B[rows of e]` for `A[P, M]` and `B[P, N]`, or when TRANSPOSED, the transpose of it.

    With TOP_K == 0, `a` describes A; else it points to `[T, M]` and `A[p] = a[order[p] // TOP_K]`. Padding rows are
    zeros in one operand and finite in the other. M (N when TRANSPOSED) is a multiple of BM, so that no store reaches
    into the next expert.
    """
    dtype: gl.constexpr = out_desc.dtype
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BM], dtype)
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES, BK, BM], a_layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], b_desc.layout)
    c_bufs = gl.allocate_shared_memory(dtype, [2, BM, BN // 2], out_desc.layout)
    ready, empty = _barriers(STAGES, COPIERS if TOP_K > 0 else 0)
    fence_async_shared()
    if TOP_K > 0:
        gl.warp_specialize([
            (_weight_consumer, (out_desc, a_bufs, b_bufs, c_bufs, ready, empty, starts, ends, num_experts, M, N,
                                stride, span, TOP_K, TRANSPOSED, GROUP_M, BM, BN, BK, STAGES, WARPS)),
            (_gathered_weight_producer, (a, order, b_desc, a_bufs, b_bufs, ready, empty, starts, ends, num_experts,
                                         M, N, stride, span, TOP_K, GROUP_M, BM, BN, BK, STAGES, COPIERS)),
        ], [COPIERS], [56])  # fmt: skip
    else:
        gl.warp_specialize([
            (_weight_consumer, (out_desc, a_bufs, b_bufs, c_bufs, ready, empty, starts, ends, num_experts, M, N,
                                stride, span, TOP_K, TRANSPOSED, GROUP_M, BM, BN, BK, STAGES, WARPS)),
            (_weight_producer, (a, b_desc, a_bufs, b_bufs, ready, empty, starts, ends, num_experts, M, N,
                                stride, span, GROUP_M, BM, BN, BK, STAGES)),
        ], [1], [24])  # fmt: skip
