"""Experts that ranks borrow for one forward, through memory that all ranks reach: weights are fetched from a host, and
the gradients of the copies join that of the host's own resident.

Who borrows what stands in device memory, where the plan of the tokens left it; a rank that borrows nothing does
nothing.

Shape legend: N ranks, E experts, M copies on a rank at most, R residents of a rank, of which the last M are copies, P
elements of one expert of a parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device


@dataclass(frozen=True)
class Loans:
    """Who borrows what from whom in one forward, on the device, int32.

    Args:
        copies: `[N, M]` experts that every rank borrows, -1 for none.
        lenders: `[N, M]` the host of each.
        multiplicity: `[N, E]` slots of rank j that hold expert e; residents stand in the order of experts.
        rank: this one.
    """

    copies: Tensor
    lenders: Tensor
    multiplicity: Tensor
    rank: int

    @property
    def most(self) -> int:
        """M."""
        return self.copies.shape[1]

    def resident(self, rank: int, expert: int) -> int:
        """Number of an expert among the residents of its host; waits for the device."""
        return int((self.multiplicity[rank, :expert] > 0).sum())


def fetch_experts_reference(loans: Loans, held: Sequence[Tensor]) -> None:
    """`fetch_experts` among the `[R, P]` weights of all ranks."""
    here = held[loans.rank]
    for number, (expert, lender) in enumerate(_pairs(loans, loans.rank)):
        if expert >= 0:
            here[len(here) - loans.most + number] = held[lender][loans.resident(lender, expert)]


def offer_gradients_reference(loans: Loans, grads: Tensor, offered: Tensor) -> None:
    """`offer_gradients` in plain torch."""
    for number, (expert, _) in enumerate(_pairs(loans, loans.rank)):
        if expert >= 0:
            offered[number] = grads[len(grads) - loans.most + number]


def collect_gradients_reference(loans: Loans, grads: Tensor, offered: Sequence[Tensor]) -> None:
    """`collect_gradients` from the `[M, P]` of all ranks."""
    totals: dict[int, Tensor] = {}
    wide = torch.promote_types(grads.dtype, torch.float32)
    for borrower, theirs in enumerate(offered):
        for number, (expert, lender) in enumerate(_pairs(loans, borrower)):
            if expert >= 0 and lender == loans.rank:
                resident = loans.resident(lender, expert)
                totals[resident] = totals.get(resident, grads[resident].to(wide)) + theirs[number].to(wide)
    for resident, total in totals.items():
        grads[resident] = total.to(grads.dtype)


def _pairs(loans: Loans, rank: int) -> list[tuple[int, int]]:
    return list(zip(loans.copies[rank].tolist(), loans.lenders[rank].tolist(), strict=True))


def fetch_experts(loans: Loans, weights: Tensor, peers: Tensor) -> None:
    """This rank's copies, from the residents of their lenders.

    Args:
        loans: of the forward.
        weights: `[R, P]` of this rank, contiguous; its last M rows are written where there is something to borrow.
        peers: `[N]` int64 on the device: address of every rank's.
    """
    from lightning_swiftmoe.kernels.shards import lent_experts_triton

    with on_device(weights):
        lent_experts_triton.launch_fetch(loans, weights, peers)


def offer_gradients(loans: Loans, grads: Tensor, offered: Tensor) -> None:
    """The gradients of this rank's copies to where their lenders find them.

    Args:
        loans: of the forward.
        grads: `[R, P]` of this rank, contiguous.
        offered: `[M, P]` in the same dtype, contiguous; rows without a copy stay as they are.
    """
    from lightning_swiftmoe.kernels.shards import lent_experts_triton

    with on_device(grads):
        lent_experts_triton.launch_offer(loans, grads, offered)


def collect_gradients(loans: Loans, grads: Tensor, peers: Tensor) -> None:
    """What borrowers offer joins the gradients of this rank's residents.

    The sum is in fp32 (fp64) and in the order of ranks, and is rounded once.

    Args:
        loans: of the forward.
        grads: `[R, P]` of this rank, contiguous.
        peers: `[N]` int64 on the device: address of what every rank offers, `[M, P]` in the same dtype.
    """
    from lightning_swiftmoe.kernels.shards import lent_experts_triton

    with on_device(grads):
        lent_experts_triton.launch_collect(loans, grads, peers)
