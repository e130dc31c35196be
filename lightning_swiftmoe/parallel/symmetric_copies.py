"""Transient copies through memory that all ranks reach: behind its residents a rank has room for experts it borrows.

A borrower reads the weights where they stand at a host, and the host reads the gradients of its loans where borrowers
offer them. Every layer has its own room, so that a backward finds what its forward fetched; what is offered stands in
one place for all layers of the same shapes, since the next layer's backward begins with a barrier.

Shape suffixes: R residents of this rank and M copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.shards.lent_experts import Loans, collect_gradients, fetch_experts, offer_gradients
from lightning_swiftmoe.parallel.peer_memory import PeerMemory, SharedTensor


class OfferedGradients:
    """Where borrowers leave the gradients of their copies.

    Args:
        memory: of the ranks.
    """

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._rooms: dict[tuple[int, torch.Size, torch.dtype], SharedTensor] = {}

    def like(self, number: int, resident: Tensor, most: int) -> SharedTensor:
        """``[M, rows, cols]`` for a parameter ``[R + M, rows, cols]`` of that number. Collective at first."""
        key = number, resident.shape[1:], resident.dtype
        if key not in self._rooms:
            self._rooms[key] = self._memory.empty((most, *resident.shape[1:]), resident.dtype)
        return self._rooms[key]


class SymmetricCopies:
    """Those of one set of experts.

    Args:
        residents: of up and down projection, ``[R + M, rows, cols]``.
        offered: for both, ``[M, rows, cols]``.
    """

    def __init__(self, residents: Sequence[SharedTensor], offered: Sequence[SharedTensor]) -> None:
        self._residents = residents
        self._offered = offered
        self._holder: weakref.ref[object] | None = None

    def are_of(self, forward: object) -> bool:
        """Whether what was fetched last was for this forward."""
        return self._holder is not None and self._holder() is forward

    def keep_for(self, forward: object) -> None:
        """From now on they are."""
        self._holder = weakref.ref(forward)

    def forget(self) -> None:
        """Hosts have other weights now."""
        self._holder = None

    def fetch(self, loans: Loans) -> None:
        """This rank's copies of both parameters."""
        for shared in self._residents:
            fetch_experts(loans, shared.local.flatten(1), shared.peers)

    def offer(self, loans: Loans, grads: Sequence[Tensor | None]) -> None:
        """The gradients of the copies, among ``[R + M, rows, cols]`` of both parameters, wait for their hosts."""
        for grad, shared in zip(grads, self._offered, strict=True):
            if grad is not None:
                offer_gradients(loans, grad.flatten(1), shared.local.flatten(1))

    def collect(self, loans: Loans, grads: Sequence[Tensor | None]) -> None:
        """What all borrowers offered, behind a barrier, joins the gradients of this rank's residents."""
        for grad, shared in zip(grads, self._offered, strict=True):
            if grad is not None:
                collect_gradients(loans, grad.flatten(1), shared.peers)
