"""The expert MLP over the padded layout: forward and backward, composed from the row kernels and one set of GEMMs.

Shape legend: T tokens, k choices, P padded rows, E experts, d model width, h hidden width, H = 2h when gated, else h.
"""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import gemms
from lightning_swiftmoe.kernels.token_permute.padded_routing import PaddedRouting
from lightning_swiftmoe.kernels.token_permute.rows import combine_rows, router_grad

_BAND_ELEMENTS = 2**28  # half of them are more than thirty waves of tiles on any GPU we know


def _sum_products(
    rows: Tensor, weight: Tensor, routing: PaddedRouting, weights: Tensor | None, transposed: bool, gemm: ModuleType
) -> Tensor:
    """`[T, N]`: each token's weighted sum of `rows[P, K] @ weight[e]`, in bands of columns if there are many of them.

    The products of one band stand in memory at a time. Half of them are waves enough for the GEMM not to notice.
    """
    columns = weight.shape[1 if transposed else 2]
    bands = 2 if routing.allocated_rows * columns > _BAND_ELEMENTS and columns % 512 == 0 else 1
    band = columns // bands
    out = rows.new_empty(routing.inverse.shape[0], columns)
    if bands == 1:
        combine_rows(gemm.rows_gemm(rows, weight, routing, transposed), routing, weights, out)
        return out
    for first in range(0, columns, band):
        part = weight.narrow(1 if transposed else 2, first, band)
        combine_rows(gemm.rows_gemm(rows, part, routing, transposed), routing, weights, out.narrow(1, first, band))
    return out


def forward(
    x: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor, routing: PaddedRouting, activation: str, path: str
) -> tuple[Tensor, Tensor]:
    """`y[T, d]` and `pre[P, H]`."""
    gemm = gemms(path)
    pre, hidden = gemm.up_gemm(gemm.expert_rows(x, routing), up_proj, routing, activation)
    return _sum_products(hidden, down_proj, routing, weights, True, gemm), pre


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
    overwrite_pre: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weights, up_proj and down_proj. Buffers go as soon as they are used up: the peak is in here.

    With `overwrite_pre`, `pre` may be used as working memory: it holds anything afterwards. `wanted` says which of the
    gradients somebody needs; those that would take a product of their own are None otherwise.
    """
    gemm = gemms(path)
    grad_rows = gemm.expert_rows(grad_y, routing)
    grad_pre, scaled_hidden, partials = gemm.hidden_grad_gemm(
        grad_rows, down_proj, pre, weights, routing, activation, pre if overwrite_pre else None
    )
    grad_weights = router_grad(partials, routing, weights)
    grad_x = grad_up = grad_down = None
    if wanted[3]:
        grad_down = gemm.weight_gemm(grad_rows, scaled_hidden, routing, in_token_order="left")
    del grad_rows, scaled_hidden, partials
    if wanted[0]:
        grad_x = _sum_products(grad_pre, up_proj, routing, None, False, gemm)
    if wanted[2]:
        grad_up = gemm.weight_gemm(grad_pre, gemm.expert_rows(x, routing), routing, in_token_order="right")
    return grad_x, grad_weights, grad_up, grad_down
