"""Experts of any variant: grouped matrix products around what their module computes itself.

Shape legend: T tokens, k choices per token, R = T * k rows in expert order, E experts, d model width, h hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.hf.checks import Projections
from lightning_swiftmoe.kernels.expert_mlp.grouped_linear import grouped_linear
from lightning_swiftmoe.kernels.token_permute.routing import route_reference


def unfused_mlp(experts: Any, weights: Projections, x_TD: Tensor, idx_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """`y[t] = sum_k weights_TK[t, k] * expert_{idx_TK[t, k]}(x[t])`, in fp32 or wider; rows go through together.

    Args:
        experts: the module, whose gate or activation and norm see rows `[R, .]` in expert order.
        weights: its own, or those of experts that stand for them.
        x_TD: tokens, of the dtype of the weights but under autocast.
        idx_TK: experts among `weights`, -1 for none.
        weights_TK: gate weights, any floating dtype; they multiply in the dtype that the two promote to.
    """
    num_tokens, top_k = idx_TK.shape
    routing = route_reference(idx_TK, weights.num_experts)
    # A row for each choice before they are sorted: the backward adds a token's gradients up wide and in order.
    rows_TKD = x_TD.unsqueeze(1).expand(num_tokens, top_k, x_TD.shape[1])
    rows_RD = rows_TKD.reshape(num_tokens * top_k, x_TD.shape[1]).index_select(0, routing.order)
    pre = _linear(rows_RD, weights.up, weights.up_bias, routing.ends, weights.transposed)
    hidden = experts._apply_gate(pre) if experts.has_gate else experts.act_fn(pre)
    out_RD = _linear(hidden, weights.down, weights.down_bias, routing.ends, weights.transposed)
    if weights.has_post_norm:
        out_RD = experts.post_expert_norm(out_RD)
    out_RD = out_RD * weights_TK.reshape(-1, 1).index_select(0, routing.order)
    out_TKD = out_RD.index_select(0, routing.inverse.reshape(-1)).view(num_tokens, top_k, out_RD.shape[1])
    # `where`, never a product with zero: a gate or a norm may make anything of a row of no expert.
    kept_TKD = torch.where(routing.kept.unsqueeze(2), out_TKD, 0)
    return kept_TKD.sum(dim=1, dtype=torch.promote_types(kept_TKD.dtype, torch.float32))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, transposed: bool) -> Tensor:
    """``grouped_linear`` under autocast's rules for a matrix product: biases and what is fp64 keep their dtype."""
    if torch.is_autocast_enabled(rows.device.type) and torch.float64 not in (rows.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    return grouped_linear(rows, weight, bias, ends, transposed)
