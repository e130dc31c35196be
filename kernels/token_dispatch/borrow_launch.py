"""The launch of who borrows what. Nothing depends on loads.

Shape legend: N ranks, E experts, M copies on a rank at most.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.launch import Launcher, next_power_of_2
from lightning_swiftmoe.kernels.token_dispatch import borrow_triton
from lightning_swiftmoe.placement.transient_copies import LEAST_PART

_TILE = 256  # shares that a warp adds up at a time, in registers; it compares half as many pairs of ranks
_INTERPRETER_COLUMNS = 4  # several steps also in small tests

_borrow = Launcher(borrow_triton.borrow_kernel)


def borrow_experts(share: Tensor, multiplicity: Tensor, most: int, least_copied: int) -> tuple[Tensor, Tensor]:
    """`borrow.borrow_experts` in one program."""
    num_ranks, num_experts = share.shape
    lanes = next_power_of_2(num_ranks)
    num_warps = max(1, min(lanes // 8, 8))
    columns = min(lanes, max(_TILE // 2 * num_warps // lanes, 1))
    if share.device.type == "cpu":
        columns = min(columns, _INTERPRETER_COLUMNS)
    copies, lenders = torch.empty(2, num_ranks, most, dtype=torch.int32, device=share.device).unbind()
    notes = torch.empty(7, num_ranks, dtype=torch.int32, device=share.device)
    _borrow(
        (1, 1, 1),
        share,
        multiplicity,
        copies,
        lenders,
        notes,
        num_ranks,
        num_experts,
        least_copied,
        num_warps=num_warps,
        MOST=most,
        LEAST_PART=LEAST_PART,
        LANES=lanes,
        EXPERTS=max(_TILE * num_warps // lanes, 1),
        COLUMNS=columns,
    )
    return copies, lenders
