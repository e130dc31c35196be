"""Routing metadata: which rows belong to which expert, without a host synchronisation.

Shape legend: T tokens, k choices per token, R = T * k assignments, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Assignments in expert order. Row `r` of the sorted layout is assignment `order[r]` = token * k + choice.

    Example, with k = 1, E = 2 and `topk_idx = [[1], [-1], [0], [1]]`: `order = [2, 0, 3, 1]`,
    `inverse = [[1], [3], [0], [2]]`, `ends = [1, 3]`; row 3 lies beyond `ends[-1]` and is dropped.
    """

    order: Tensor  # [R] int32: sorted row -> assignment; dropped assignments last
    inverse: Tensor  # [T, k] int32: assignment -> sorted row
    ends: Tensor  # [E] int32: one past the last row of each expert
    packed: Tensor  # the three above in one buffer, so that an op can return them

    @property
    def tokens(self) -> Tensor:
        """`[R]` int32: the token of each sorted row."""
        return self.order // self.inverse.shape[1] if self.inverse.shape[1] else self.order

    @property
    def kept(self) -> Tensor:
        """`[T, k]` bool: whether the assignment was processed."""
        return self.inverse < self.ends[-1]


def route_reference(topk_idx: Tensor, num_experts: int) -> Routing:
    """Sort assignments by expert, stably, in plain torch.

    Args:
        topk_idx: `[T, k]` integers in `[-1, num_experts)`; -1 marks a dropped assignment.
        num_experts: E.
    """
    flat = topk_idx.reshape(-1)
    key = torch.where(flat < 0, num_experts, flat)
    sorted_key, order = torch.sort(key, stable=True)
    experts = torch.arange(num_experts, device=flat.device, dtype=sorted_key.dtype)
    ends = torch.searchsorted(sorted_key, experts, right=True, out_int32=True)
    rows = torch.arange(flat.numel(), device=flat.device, dtype=torch.int32)
    inverse = torch.empty_like(rows).scatter_(0, order, rows)
    packed = torch.cat((order.to(torch.int32), inverse, ends))
    return unpack_reference(packed, *topk_idx.shape, num_experts)


def unpack_reference(packed: Tensor, num_tokens: int, top_k: int, num_experts: int) -> Routing:
    """The routing whose packed buffer this is."""
    num_assignments = num_tokens * top_k
    order, inverse, ends = packed.split((num_assignments, num_assignments, num_experts))
    return Routing(order, inverse.view(num_tokens, top_k), ends, packed)
