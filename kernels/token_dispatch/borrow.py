"""Who borrows which expert for one forward, decided on the device: `placement.transient_copies` without the host.

Shape legend: N ranks, E experts, M copies on a rank at most.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device, uses_triton
from lightning_swiftmoe.placement import Placement
from lightning_swiftmoe.placement.transient_copies import lenders, with_copies


def borrow_experts(share: Tensor, multiplicity: Tensor, most: int, least_copied: int = 0) -> tuple[Tensor, Tensor]:
    """Copies for what the exact split has left uneven; `share` changes in place.

    One program on a GPU; nothing depends on the loads but how long it takes.

    Args:
        share: `[N, E]` int32 of the exact split, below 2**30 together.
        multiplicity: `[N, E]` int32 slots of rank j that hold expert e.
        most: M, at least 1.
        least_copied: assignments that a copy must take over.

    Returns:
        `[N, M]` int32 experts that every rank borrows, the largest part first, -1 for none; and the host of each.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    if share.dtype != torch.int32 or not share.is_contiguous():
        raise ValueError(f"share must be contiguous int32, got {share.dtype} with strides {share.stride()}")
    if multiplicity.shape != share.shape or multiplicity.dtype != torch.int32 or not multiplicity.is_contiguous():
        raise ValueError(
            f"multiplicity must be contiguous int32 {list(share.shape)}, "
            f"got {multiplicity.dtype} {list(multiplicity.shape)}"
        )
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    if not uses_triton(share):
        return borrow_experts_reference(share, multiplicity, most, least_copied)
    from lightning_swiftmoe.kernels.token_dispatch import borrow_launch

    with on_device(share):
        return borrow_launch.borrow_experts(share, multiplicity, most, least_copied)


def borrow_experts_reference(
    share: Tensor, multiplicity: Tensor, most: int, least_copied: int = 0
) -> tuple[Tensor, Tensor]:
    """`borrow_experts` on the host."""
    before = share.long().cpu().numpy()
    slots = multiplicity.cpu().numpy()
    placement = placement_of(slots)
    found = with_copies(before, placement, most, least_copied=least_copied)
    lender = lenders(found.copied, placement)
    copies = np.full((len(before), most), -1)
    hosts = np.full((len(before), most), -1)
    amounts = np.where(found.copied, found.hosted, 0)
    for rank, row in enumerate(np.argsort(-amounts, axis=1, kind="stable")[:, :most]):
        chosen = row[amounts[rank, row] > 0]
        copies[rank, : chosen.size] = chosen
        hosts[rank, : chosen.size] = lender[rank, chosen]
    share.copy_(torch.from_numpy(found.hosted))
    return torch.from_numpy(copies).int().to(share.device), torch.from_numpy(hosts).int().to(share.device)


def placement_of(multiplicity: np.ndarray) -> Placement:
    """A placement with these slots, in the order of experts."""
    ranks, experts = np.nonzero(multiplicity)
    table = np.repeat(experts, multiplicity[ranks, experts])
    return Placement(table.reshape(len(multiplicity), -1), multiplicity.shape[1])
