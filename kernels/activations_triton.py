"""Element-wise activations inside Triton kernels; the twins of `activations.py`, selected by the same codes."""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    # Through the sigmoid of 2z: exact limits at both ends, where exp overflows to infinity.
    return 2.0 * _sigmoid(2.0 * z) - 1.0


@triton.jit
def act_value(z, ACT: tl.constexpr):
    """Value of element-wise function ACT (see `ELEMENTWISE_CODES`) at fp32 z."""
    if ACT == 0:
        return z * _sigmoid(z)
    elif ACT == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == 2:
        return z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == 3:
        return tl.maximum(z, 0.0)
    else:
        p = tl.maximum(z, 0.0)
        return p * p


@triton.jit
def act_slope(z, ACT: tl.constexpr):
    """Derivative of element-wise function ACT at fp32 z."""
    if ACT == 0:
        s = _sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACT == 1:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == 2:
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * z * z)
    elif ACT == 3:
        return tl.where(z > 0.0, 1.0, 0.0)
    else:
        return 2.0 * tl.maximum(z, 0.0)


@triton.jit
def act_forward_kernel(pre, hidden, num_rows, H, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """`hidden[p, :H] = act(pre[p])`; pre is `[P, 2H]` when GATED, gate first. Grid: rows, column blocks."""
    row = tl.program_id(0)
    if row >= tl.load(num_rows):
        return
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < H
    base = pre + row.to(tl.int64) * (2 * H if GATED else H)
    value = act_value(tl.load(base + cols, mask=mask, other=0.0).to(tl.float32), ACT)
    if GATED:
        value *= tl.load(base + H + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden + row.to(tl.int64) * H + cols, value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def act_backward_kernel(
    pre,
    grad_hidden,
    weights,
    row_assignment,
    num_rows,
    grad_pre,
    scaled_hidden,
    grad_weights,
    H,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward of `s * act(pre)` row by row; one program owns a row, so the sum for the router weight has one order.

    Writes `grad_pre`, `scaled_hidden = s * act(pre)` and, at the row's assignment, `grad_weights = <grad, act(pre)>`.
    Pad rows have no assignment: s = 0, and pre and grad_hidden are zeros there.
    """
    row = tl.program_id(0)
    if row >= tl.load(num_rows):
        return
    assignment = tl.load(row_assignment + row)
    scale = tl.load(weights + assignment, mask=assignment >= 0, other=0.0).to(tl.float32)
    wide = row.to(tl.int64)
    stride = 2 * H if GATED else H
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < H
        z = tl.load(pre + wide * stride + cols, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_hidden + wide * H + cols, mask=mask, other=0.0).to(tl.float32)
        value = act_value(z, ACT)
        slope = act_slope(z, ACT)
        if GATED:
            up = tl.load(pre + wide * stride + H + cols, mask=mask, other=0.0).to(tl.float32)
            grad_up = scale * grad * value
            tl.store(grad_pre + wide * stride + H + cols, grad_up.to(grad_pre.dtype.element_ty), mask=mask)
            slope *= up
            value *= up
        tl.store(grad_pre + wide * stride + cols, (scale * grad * slope).to(grad_pre.dtype.element_ty), mask=mask)
        tl.store(scaled_hidden + wide * H + cols, (scale * value).to(scaled_hidden.dtype.element_ty), mask=mask)
        total += grad * value
    tl.store(grad_weights + assignment, tl.sum(total).to(grad_weights.dtype.element_ty), mask=assignment >= 0)
