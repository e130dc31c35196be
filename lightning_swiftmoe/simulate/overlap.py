"""What our runtime hides behind computing: exchanges of state by layer (docs/decisions/0008-overlap.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]


def hidden_s(forward_s: Seconds, backward_s: Seconds, weight_s: Seconds, gradient_s: Seconds) -> Seconds:
    """``[T]`` seconds of the weight and the gradient phase in which ranks compute; the rest they wait for.

    Weights leave for all layers when a forward begins, in its order, and a layer waits for its own. Gradients of a
    layer leave when its backward is over. Rather less is said to be hidden than is: nothing
    travels beside tokens, which need the same network, and what is dense in front of a layer waits with it.

    Args:
        forward_s: ``[T, L]`` computing alone, in a layer and what is dense in front of it, in the order of the forward.
        backward_s: ``[T, L]`` the same of the backward, in the order of the forward too.
        weight_s: ``[T, L]`` exchange of a layer's weights, one after the other.
        gradient_s: ``[T, L]`` exchange of its gradients.
    """
    forward = two_stages_s(weight_s, forward_s)
    backward = two_stages_s(backward_s[:, ::-1], gradient_s[:, ::-1])
    one_by_one = sum(part.sum(axis=1) for part in (forward_s, backward_s, weight_s, gradient_s))
    # Sums of the same numbers in another order: what is below a picosecond is rounding.
    hidden: Seconds = np.maximum(one_by_one - forward - backward, 0.0).round(12)
    return hidden


def two_stages_s(first_s: Seconds, second_s: Seconds) -> Seconds:
    """``[T]`` until all layers went through both stages, in order; each stage has one at a time.

    ``max_k sum_{i<=k} first_i + sum_{i>=k} second_i`` (Johnson, 1954: the flow shop of two machines).
    """
    until = np.cumsum(first_s, axis=1)
    onwards = np.cumsum(second_s[:, ::-1], axis=1)[:, ::-1]
    longest: Seconds = (until + onwards).max(axis=1)
    return longest
