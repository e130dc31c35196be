"""``experts_implementation="swiftmoe"``: the experts of a transformers model on our kernels.

Shape legend: T tokens, k choices per token, E experts, d model width, h hidden width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_swiftmoe.functional import expert_mlp
from lightning_swiftmoe.hf._transformers import ALL_EXPERTS_FUNCTIONS
from lightning_swiftmoe.hf.activations import fused_activation
from lightning_swiftmoe.hf.checks import NAME, check_indices, check_inputs, projections
from lightning_swiftmoe.hf.layer import attached_layer
from lightning_swiftmoe.hf.unfused import unfused_mlp


def register() -> None:
    """Make ``experts_implementation="swiftmoe"`` known to transformers; a second call changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`y[t] = sum_k top_k_weights[t, k] * expert_{top_k_index[t, k]}(hidden_states[t])`: what transformers calls.

    Experts that are plain MLPs (`[E, H, d]` and `[E, d, h]` without biases, one of our activations, gated or not) run
    as one fused op.
    Others run as grouped matrix products around what the module itself does between and after them.
    Gate weights multiply an expert's output, after its bias and norm, as in the models' eager paths.
    They do so in the dtype that the two promote to, in the fused op in fp32 at least; a token's outputs are added in
    fp32 (fp64 for fp64).
    Differentiable once in `hidden_states`, `top_k_weights` and the module's Parameters.
    Experts without tokens get zero gradients, and so do all where there are no tokens.
    Under autocast matrix products run in its dtype.
    Inside a strategy of ours tokens travel to the ranks that hold their experts, and every rank must call.

    Args:
        experts: a module of a class with transformers' ``@use_experts_implementation``.
        hidden_states: `[T, d]`, fp64, fp32, bf16 or fp16. T may be zero.
        top_k_index: `[T, k]` int32 or int64; -1 and E stand for no expert.
        top_k_weights: `[T, k]`, any floating dtype. Of a choice of no expert it has a zero gradient, whatever it is.

    Returns:
        `[T, d]` in the dtype of `hidden_states`.

    Raises:
        ValueError: the module says that it is something it cannot be, holds weights that are quantised or sharded, or
            is called with shapes or dtypes that do not fit; and, where the check needs no host synchronisation (CPU),
            an expert index outside `[-1, E]`.
    """
    layer = attached_layer(experts)
    if layer is not None:
        return layer(hidden_states, top_k_index, top_k_weights)
    weights = projections(experts)
    check_inputs(experts, weights, hidden_states, top_k_index, top_k_weights)
    check_indices(experts, weights.num_experts, top_k_index)
    idx_TK = top_k_index.masked_fill(top_k_index >= weights.num_experts, -1)
    activation = fused_activation(experts) if weights.are_plain else None
    if activation is not None:
        y_TD = expert_mlp(hidden_states, idx_TK, top_k_weights, weights.up, weights.down, activation)
    else:
        y_TD = unfused_mlp(experts, weights, hidden_states, idx_TK, top_k_weights)
    return y_TD.to(hidden_states.dtype)
