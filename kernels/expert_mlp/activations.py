"""Activations of an expert MLP: their names, values and derivatives, in plain torch.

A gated activation takes `pre[R, 2h]`, gate columns first, and gives `act(gate) * up`; a plain one takes `pre[R, h]`.
The Triton twins live in `activations_triton.py` and are selected by the same `ACTIVATION_CODES`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
_PLAIN = ("gelu", "gelu_tanh", "relu", "relu2", "silu")

# Codes of the element-wise functions, shared with the Triton kernels.
ELEMENTWISE_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
NARROW_GELU_CODE = 5  # gelu with a polynomial for erf, close enough for 16-bit results


def activation_names() -> tuple[str, ...]:
    """Every valid `activation`, gated ones first."""
    return (*_GATED, *_PLAIN)


def _check(activation: str) -> None:
    if activation not in _GATED and activation not in _PLAIN:
        raise ValueError(f"unknown activation {activation!r}; valid names: {', '.join(activation_names())}")


def is_gated(activation: str) -> bool:
    """Whether `activation` multiplies a gate with an up projection, so that `up_proj` is `[E, 2h, d]`.

    Raises:
        ValueError: if the name is unknown; the message lists the valid ones.
    """
    _check(activation)
    return activation in _GATED


def elementwise_name(activation: str) -> str:
    """The element-wise function inside `activation`: 'swiglu' -> 'silu', 'gelu' -> 'gelu'."""
    _check(activation)
    return _GATED.get(activation, activation)


def kernel_code(activation: str, dtype: torch.dtype) -> int:
    """The integer by which the Triton kernels know the element-wise function of `activation` on values of `dtype`."""
    code = ELEMENTWISE_CODES[elementwise_name(activation)]
    narrow = dtype in (torch.bfloat16, torch.float16)
    return NARROW_GELU_CODE if narrow and code == ELEMENTWISE_CODES["gelu"] else code


# Each is one fused pass: on a CPU, a chain of element-wise passes takes longer than the matrix products around it.
_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # Hendrycks & Gimpel, arXiv 1606.08415, section 2
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),  # So et al., Primer, arXiv 2109.08668, section 4
}

# Gradient of the input from that of the value, and the input.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "relu2": lambda grad, z: 2 * grad * F.relu(z),
}


def activation_forward(pre: Tensor, activation: str) -> Tensor:
    """Hidden values from pre-activations, computed in at least fp32.

    Args:
        pre: `[R, 2h]` (gate columns first) for a gated activation, else `[R, h]`.
        activation: one of `activation_names()`.

    Returns:
        `[R, h]` in `pre.dtype`.
    """
    wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
    value = _VALUE[elementwise_name(activation)]
    if not is_gated(activation):
        return value(wide).to(pre.dtype)
    gate, up = wide.chunk(2, dim=-1)
    return (value(gate) * up).to(pre.dtype)


def activation_backward(
    pre: Tensor, grad_hidden: Tensor, scale: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `scale * activation(pre)` for a gradient that has not been scaled yet.

    Args:
        pre: `[R, 2h]` or `[R, h]`, saved by the forward.
        grad_hidden: `[R, h]`, gradient of the row's *unweighted* output with respect to the hidden values.
        scale: `[R]`, the router weight of each row.
        activation: one of `activation_names()`.

    Returns:
        `grad_pre` shaped as `pre`, scaled; `scaled_hidden[R, h] = scale * activation(pre)`, whose product with the
        output gradient is the down-projection's gradient; `grad_scale[R]`, the gradient of the router weight, wide.
    """
    wide_dtype = torch.promote_types(pre.dtype, torch.float32)
    wide, grad = pre.to(wide_dtype), grad_hidden.to(wide_dtype)
    scale = scale.to(wide_dtype).unsqueeze(-1)
    value, backward = (table[elementwise_name(activation)] for table in (_VALUE, _BACKWARD))
    scaled_grad = scale * grad
    if is_gated(activation):
        gate, up = wide.chunk(2, dim=-1)
        gate_value = value(gate)
        hidden = gate_value * up
        grad_pre = torch.cat((backward(scaled_grad * up, gate), scaled_grad * gate_value), dim=-1)
    else:
        hidden = value(wide)
        grad_pre = backward(scaled_grad, wide)
    grad_scale = (grad * hidden).sum(dim=-1)
    return grad_pre.to(pre.dtype), (scale * hidden).to(pre.dtype), grad_scale
