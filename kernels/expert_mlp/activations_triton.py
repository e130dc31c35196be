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
def _erf_narrow(z):
    """`erf(z / sqrt(2))` within 2.1e-5: an odd polynomial fitted on |z| <= 4.2, a third of the cost of `erf`."""
    z = tl.minimum(tl.maximum(z, -4.2), 4.2)
    s = z * z
    p = 1.199609121301341e-10 * s - 1.1266602896564441e-08
    p = p * s + 4.6873387797709604e-07
    p = p * s - 1.1521523791184715e-05
    p = p * s + 0.0001891486646333091
    p = p * s - 0.002228295334799803
    p = p * s + 0.01966025903840382
    p = p * s - 0.13272074086238106
    p = p * s + 0.7978148752383931
    return p * z


@triton.jit
def act_value(z, ACT: tl.constexpr):
    """Value of element-wise function ACT (see `ELEMENTWISE_CODES`) at fp32 z."""
    if ACT == 0:
        return z * _sigmoid(z)
    if ACT == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACT == 2:
        return z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    if ACT == 3:
        return tl.maximum(z, 0.0)
    if ACT == 5:
        return 0.5 * z + 0.5 * z * _erf_narrow(z)
    p = tl.maximum(z, 0.0)
    return p * p


@triton.jit
def act_slope(z, ACT: tl.constexpr):
    """Derivative of element-wise function ACT at fp32 z."""
    if ACT == 0:
        s = _sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    if ACT == 1:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    if ACT == 2:
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * z * z)
    if ACT == 3:
        return tl.where(z > 0.0, 1.0, 0.0)
    if ACT == 5:
        return 0.5 + 0.5 * _erf_narrow(z) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    return 2.0 * tl.maximum(z, 0.0)


@triton.jit
def _tanh_ptx(z):
    """Hopper's own tanh, one instruction, relative error 2**-11: below half a unit of bf16."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp2_ptx(z):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def act_value_ptx(z, ACT: tl.constexpr):
    """`act_value` for 16-bit results on NVIDIA: in a GEMM's epilogue nothing hides the instructions."""
    if ACT == 0:
        half = 0.5 * z
        return half * _tanh_ptx(half) + half
    if ACT == 2:
        half = 0.5 * z
        return half * _tanh_ptx(z * (0.035677408136300125 * z * z + 0.7978845608028654)) + half
    return act_value(z, ACT)


@triton.jit
def act_both_ptx(z, ACT: tl.constexpr):
    """Value and slope for 16-bit results on NVIDIA, in as few instructions as we know."""
    if ACT == 0:
        s = 0.5 * _tanh_ptx(0.5 * z) + 0.5
        value = z * s
        return value, s + value - value * s
    if ACT == 5:
        cdf = 0.5 + 0.5 * _erf_narrow(z)
        return z * cdf, cdf + 0.3989422804014327 * z * _exp2_ptx(-0.7213475204444817 * z * z)
    return act_value(z, ACT), act_slope(z, ACT)


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
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


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
def act_backward_kernel(
    pre, grad_hidden, weights, order, num_rows, grad_pre, scaled_hidden, grad_scale, H,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of `s * act(pre)` row by row; one program owns a row, so the sum for the router weight has one order.

    Writes `grad_pre`, `scaled_hidden = s * act(pre)` and `grad_scale = <grad_hidden, act(pre)>` for
    `s[p] = weights[order[p]]`. In padding rows, where order is -1, s, pre and grad_hidden are zeros.
    """
    row = tl.program_id(0)
    if row >= tl.load(num_rows):
        return
    assignment = tl.load(order + row)
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
    tl.store(grad_scale + row, tl.sum(total))
