"""The expert MLP over the padded layout: forward and backward, composed from the row kernels and one set of GEMMs.

Shape legend: T tokens, k choices, P padded rows, E experts, d model width, h hidden width, H = 2h when gated, else h.
"""

import importlib
from types import ModuleType

from torch import Tensor

from lightning_swiftmoe.kernels.padded_routing import PaddedRouting
from lightning_swiftmoe.kernels.rows import combine_rows, router_grad, spread_rows

_GEMMS = {"hopper": "hopper", "triton": "portable", "grouped_mm": "library"}


def gemms(path: str) -> ModuleType:
    """The module with the GEMM launchers of a path: "hopper", "triton" or "grouped_mm"."""
    return importlib.import_module(f"lightning_swiftmoe.kernels.{_GEMMS[path]}")


def forward(
    x: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor, routing: PaddedRouting, activation: str, path: str
) -> tuple[Tensor, Tensor]:
    """`y[T, d]` and `pre[P, H]`."""
    gemm = gemms(path)
    rows, _ = spread_rows(x, routing)
    pre, hidden = gemm.up_gemm(rows, up_proj, routing, activation)
    del rows
    out = gemm.rows_gemm(hidden, down_proj, routing, transposed=True)
    return combine_rows(out, routing, weights), pre


def backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    routing: PaddedRouting,
    activation: str,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up_proj and down_proj. Buffers go as soon as they are used up: the peak is in here."""
    gemm = gemms(path)
    grad_rows, row_scale = spread_rows(grad_y, routing, weights)
    grad_pre, scaled_hidden, partials = gemm.hidden_grad_gemm(grad_rows, down_proj, pre, row_scale, routing, activation)
    grad_weights = router_grad(partials, routing, weights)
    grad_down = gemm.weight_gemm(grad_rows, scaled_hidden, routing)
    del grad_rows, scaled_hidden, partials
    out = gemm.rows_gemm(grad_pre, up_proj, routing, transposed=False)
    grad_x = combine_rows(out, routing, None)
    del out
    rows, _ = spread_rows(x, routing)
    grad_up = gemm.weight_gemm(grad_pre, rows, routing)
    return grad_x, grad_weights, grad_up, grad_down
