"""torch's own `grouped_mm` around our row kernels, with the signatures of `hopper.py`: 16-bit, any CUDA device.

Shape legend: P padded rows, E experts, d model width, h hidden width, H = 2h when gated, else h.
"""

from torch import Tensor
from torch.nn import functional as F

from lightning_swiftmoe.kernels.expert_mlp.grouped import kept_in
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout
from lightning_swiftmoe.kernels.launch import is_recording
from lightning_swiftmoe.kernels.token_permute.padded_routing import PaddedRouting
from lightning_swiftmoe.kernels.token_permute.rows import act_backward, act_forward, expert_rows

__all__ = ["expert_rows", "hidden_grad_gemm", "rows_gemm", "up_gemm", "weight_gemm"]


def rows_gemm(
    rows: Tensor, weight: Tensor, routing: PaddedRouting | RowLayout, transposed: bool, out: Tensor | None = None
) -> Tensor:
    """`out[p] = rows[p] @ weight[e]` for `weight[E, K, N]`, or with `weight[e].T` for `[E, N, K]` when transposed."""
    weight = weight.mT if transposed else weight
    if is_recording():  # torch would read bounds that no kernel has written
        return rows.new_empty(rows.shape[0], weight.shape[2]) if out is None else out
    return kept_in(out, F.grouped_mm(rows, weight, offs=routing.padded_ends))


def up_gemm(
    rows: Tensor,
    up_proj: Tensor,
    routing: PaddedRouting | RowLayout,
    activation: str,
    hidden: Tensor | None = None,
    pre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`pre[P, H] = rows @ up_proj[e].T` and `hidden[P, h] = act(pre)`; memory for hidden values goes unused."""
    pre = rows_gemm(rows, up_proj, routing, transposed=True, out=pre)
    return pre, act_forward(pre, routing, activation)


def hidden_grad_gemm(
    grad_rows: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    weights: Tensor,
    routing: PaddedRouting | RowLayout,
    activation: str,
    grad_pre: Tensor | None = None,
    scaled_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_pre[P, H]`, `scaled_hidden[P, h]` and `partials[1, P]`; see `hopper.hidden_grad_gemm`.

    Memory for `scaled_hidden` goes unused.
    """
    grad_hidden = rows_gemm(grad_rows, down_proj, routing, transposed=False)
    return act_backward(pre, grad_hidden, weights, routing, activation, grad_pre)


def weight_gemm(
    left: Tensor,
    right: Tensor,
    routing: PaddedRouting | RowLayout,
    in_token_order: str,
    out: Tensor | None = None,
) -> Tensor:
    """`out[e] = left[rows of e].T @ right[rows of e]` as `[E, M, N]`; zeros for an expert without rows.

    `in_token_order` names the operand that came from `expert_rows`; here both stand in expert order.
    """
    if is_recording():
        return left.new_empty(routing.ends.shape[0], left.shape[1], right.shape[1]) if out is None else out
    return kept_in(out, F.grouped_mm(left.mT, right, offs=routing.padded_ends))
