"""Tensors to the host by one thread while another waits for the device, perhaps forever.

Nothing of the other's comes before what is on this thread's own stream, and a copy to memory that was pinned in time
only goes into a queue. Where the other waits in a copy to pageable memory (``cpu()``, ``tolist()``), CUDA's driver
lets other threads ask events and little else, and where a kernel runs for the first time, its loading waits for the
device. Either may be forever: whoever waits for this thread asks whether it is stuck.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_PIECE = 64 * 2**20  # bytes: milliseconds of a link, and little memory
_PERIOD_S = 1e-4
_STUCK_S = 10.0


class CopiesAside:
    """Made by the thread that may wait, used by the other.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
        self._called_at: float | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether the thread has been in the driver for longer than anything it does there takes."""
        called_at = self._called_at
        return called_at is not None and time.monotonic() - called_at > _STUCK_S

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Around what calls the driver, and should be over soon."""
        self._called_at = time.monotonic()
        try:
            yield
        finally:
            self._called_at = None

    def to_host(self, tensor: Tensor) -> Tensor:
        """The same values in pageable memory; a tensor that is there already, itself. For one thread at a time."""
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor
        with torch.cuda.stream(self.stream):
            with self.calls():
                source = tensor.contiguous().view(-1).view(torch.uint8)
            found = torch.empty(source.numel(), dtype=torch.uint8)
            for piece, arrived in zip(source.split(_PIECE), found.split(_PIECE), strict=True):
                pinned = self._pinned[: piece.numel()]
                with self.calls():
                    pinned.copy_(piece, non_blocking=True)
                    while not self.stream.query():
                        time.sleep(_PERIOD_S)
                arrived.copy_(pinned)
        return found.view(tensor.dtype).view(tensor.shape)
