"""Tensors to the host by one thread while another waits in the driver, perhaps forever.

A copy from a GPU to pageable memory, such as ``tensor.item()`` is, waits for all before it on its stream, and while it
waits those of other threads seem to wait too. A copy to pinned memory only goes into a queue. So this thread copies to
a piece of memory that was pinned in time, on a stream of its own, asks now and then whether it has arrived, and makes
nothing anew on the device.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

_PIECE = 64 * 2**20  # bytes: milliseconds of a link, and little memory
_PERIOD_S = 1e-4


class CopiesAside:
    """Made by the thread that may wait, used by the other.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        """The same values in pageable memory; a tensor that is there already, itself. For one thread at a time."""
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor
        source = tensor.contiguous().view(-1).view(torch.uint8)
        found = torch.empty(source.numel(), dtype=torch.uint8)
        with torch.cuda.stream(self.stream):
            for piece, arrived in zip(source.split(_PIECE), found.split(_PIECE), strict=True):
                pinned = self._pinned[: piece.numel()]
                pinned.copy_(piece, non_blocking=True)
                while not self.stream.query():
                    time.sleep(_PERIOD_S)
                arrived.copy_(pinned)
        return found.view(tensor.dtype).view(tensor.shape)
