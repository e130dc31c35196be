"""Transient copies: a host lends an expert's weights for one forward, and its gradient comes back to that host.

The gradient joins that of the host's own resident, which the gradient phase brings to the shards with all others: that
sends as much as a copy whose gradient went to the shards itself, and knows nothing of steps, accumulation or state.

Shape suffixes: N ranks, E experts, R residents of this rank, B copies that it borrows, P rows that arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.placement import Placement
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.placement.transient_copies import lenders

PHASE = "transient_copies"


@dataclass(frozen=True, eq=False)
class Loans:
    """What one rank lends and borrows in a forward. Every rank derives its own from the same plan.

    Args:
        lent: residents that it lends, by borrower, then expert; one number for each loan.
        lends: ``N``, how many to each rank.
        borrowed: ``[B]`` experts that it borrows, ascending.
        order: ``[B]`` where each of them arrives: by lender, then expert.
        borrows: ``N``, how many from each rank.
    """

    lent: list[int]
    lends: list[int]
    borrowed: IntArray
    order: IntArray
    borrows: list[int]

    @classmethod
    def of(cls, copied: NDArray[np.bool_], placement: Placement, rank: int) -> Loans:
        """Of ``rank``, from who has a copy of what, ``[N, E]``."""
        lender = lenders(copied, placement)
        borrowers, lent_experts = np.nonzero(lender == rank)
        residents = placement.residents(rank)
        borrowed = np.flatnonzero(copied[rank])
        sources = lender[rank, borrowed]
        num_ranks = placement.num_ranks
        return cls(
            np.searchsorted(residents, lent_experts).tolist(),
            np.bincount(borrowers, minlength=num_ranks).tolist(),
            borrowed,
            np.argsort(np.argsort(sources, kind="stable")),
            np.bincount(sources, minlength=num_ranks).tolist(),
        )


def borrow(
    rows_PD: Tensor, residents: Mapping[str, Tensor], loans: Loans, communicator: Communicator, name: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows themselves, and ``[B, ...]`` copies of all weights of the borrowed experts, experts ascending.

    Collective, and so is its backward.

    Args:
        rows_PD: what arrived: it passes through, so that every rank takes part in the backward, whatever it borrows.
        residents: ``[>= R, ...]`` of this rank.
        loans: of this rank.
        communicator: for tokens.
        name: of the MoE layer, for error messages.
    """
    passed_PD, *copies = _Borrow.apply(rows_PD, loans, communicator, name, *residents.values())  # type: ignore[no-untyped-call]
    return passed_PD, dict(zip(residents, copies, strict=True))


class _Borrow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_PD: Tensor, loans: Loans, communicator: Communicator, name: str, *residents: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.args = loans, communicator, name
        ctx.shapes = [weights.shape for weights in residents]
        order = torch.from_numpy(loans.order).to(rows_PD.device)

        def fetched(weights: Tensor) -> Tensor:
            lent = weights[loans.lent]
            return communicator.all_to_all(lent, loans.lends, loans.borrows, PHASE, name)[order]

        return rows_PD.view_as(rows_PD), *map(fetched, residents)

    @staticmethod
    @torch.autograd.function.once_differentiable  # autograd does not see what travels
    def backward(ctx: Any, grad_PD: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        loans, communicator, name = ctx.args

        def returned(grad: Tensor, shape: torch.Size) -> Tensor:
            by_lender = torch.empty_like(grad)
            by_lender[torch.from_numpy(loans.order).to(grad.device)] = grad
            arrived = communicator.all_to_all(by_lender, loans.borrows, loans.lends, PHASE, name)
            total = torch.zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
            # One after the other: the same sum on every run.
            for resident, part in zip(loans.lent, arrived, strict=True):
                total[resident] += part
            return total.to(grad.dtype)

        wanted = zip(ctx.needs_input_grad[4:], grads, ctx.shapes, strict=True)
        back = [returned(grad, shape) if needed else None for needed, grad, shape in wanted]
        return grad_PD, None, None, None, *back
