"""Where each assignment of the local batch goes: the host and the row there.

Shape legend: T tokens, k choices, R = T * k assignments, N ranks, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device, uses_triton
from lightning_swiftmoe.kernels.token_dispatch.token_plan import TokenPlan


@dataclass(frozen=True)
class Address:
    """Host and row of each assignment; both -1 where it is dropped. Int32, on the device."""

    host: Tensor  # [T, k]: the rank that processes it
    row: Tensor  # [T, k]: of that host's padded layout, or of the send buffer when the plan is packed


def address_tokens_reference(topk_idx: Tensor, plan: TokenPlan) -> Address:
    """`address_tokens` in plain torch."""
    num_experts = plan.send.shape[1]
    expert = topk_idx.flatten()
    named = (expert >= 0) & (expert < num_experts)
    expert = torch.where(named, expert, 0)
    one_hot = torch.nn.functional.one_hot(expert, num_experts) * named[:, None]
    number = (one_hot.cumsum(dim=0) - one_hot).gather(1, expert[:, None])[:, 0]
    # The last host before which no more than `number` assignments are sent.
    host = (plan.send_until[:, expert] <= number).sum(dim=0) - 1
    row = plan.base[host, expert] + number
    goes = named & (number < plan.kept[expert]) & (row >= 0) & (row < _most_rows(plan, expert.numel()))
    host, row = (torch.where(goes, t, -1).int().view(topk_idx.shape) for t in (host, row))
    return Address(host, row)


def address_tokens(topk_idx: Tensor, plan: TokenPlan) -> Address:
    """Host and row of each assignment, without the host's help: three kernels on a GPU.

    An assignment whose row its host has no place for counts as dropped, so that nothing is written out of bounds; a
    caller who reserves less than the worst case looks at `plan.needed_rows`.

    Args:
        topk_idx: `[T, k]` int64 expert of each assignment; anything outside `[0, E)` is dropped. Row `rank` of the
            counts that made the plan must count exactly these.
        plan: this rank's plan.
    """
    if topk_idx.numel() == 0:
        nothing = torch.empty(topk_idx.shape, dtype=torch.int32, device=topk_idx.device)
        return Address(nothing, nothing)
    if not uses_triton(topk_idx):
        return address_tokens_reference(topk_idx, plan)
    from lightning_swiftmoe.kernels.token_dispatch import address_launch

    with on_device(topk_idx):
        host, row = address_launch.address_tokens(topk_idx.contiguous(), plan, _most_rows(plan, topk_idx.numel()))
    return Address(host, row)


def _most_rows(plan: TokenPlan, num_assignments: int) -> int:
    """Rows that the target can hold: a host's padded layout, or a send buffer of this batch."""
    return num_assignments if plan.size.layout == "packed" else plan.size.max_rows
