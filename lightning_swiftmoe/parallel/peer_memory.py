"""Memory that the ranks of one memory domain read and write directly, and the signals that order it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_swiftmoe.kernels.token_dispatch import barrier
from lightning_swiftmoe.kernels.token_dispatch.barrier import Signals, exchange_counts, pad_size
from lightning_swiftmoe.kernels.token_dispatch.move import peer_addresses
from lightning_swiftmoe.parallel.communicator import Communicator


class Channel(IntEnum):
    """Independent sequences of barriers, each used by one stream at a time."""

    COUNTS = 0
    ROWS = 1
    STATE = 2


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """A tensor that every rank of a group holds and can reach.

    Args:
        local: this rank's.
        peers: ``[N]`` int64 on the device, the address of every rank's.
        handle: keeps the peers' memory mapped.
    """

    local: Tensor
    peers: Tensor
    handle: Any

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Any) -> SharedTensor:
        """Undefined values. Collective, and waits for all ranks: at set-up only."""
        import torch.distributed._symmetric_memory as symmetric_memory

        local = symmetric_memory.empty(shape, dtype=dtype, device=device)
        handle = symmetric_memory.rendezvous(local, group)
        return cls(local, peer_addresses(list(handle.buffer_ptrs), device), handle)


class PeerMemory:
    """Gives out shared tensors, and keeps the signals.

    Args:
        group: ranks that reach each other's memory.
        device: of this rank.
        control: the same ranks, on the host.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, control: Communicator) -> None:
        self.device = device
        self.num_ranks = control.num_ranks
        self.rank = control.rank
        self._group = group
        self._control = control
        self._pads: SharedTensor | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> SharedTensor:
        """Undefined values, on every rank. Collective, and waits for all ranks: at set-up only."""
        return SharedTensor.empty(shape, dtype, self.device, self._group)

    def synchronize(self) -> None:
        """At set-up: no rank goes on before all have what was made."""
        torch.cuda.synchronize(self.device)
        dist.barrier(self._control.group)

    @cached_property
    def signals(self) -> Signals:
        """For kernels that come with a barrier. Collective the first time."""
        pads = self.empty((pad_size(self.num_ranks, len(Channel)),), torch.int32)
        pads.local.zero_()
        self._pads = pads  # signals are addresses: somebody must hold the memory
        self.synchronize()
        epochs = torch.zeros(len(Channel), dtype=torch.int32, device=self.device)
        return Signals(pads.peers, epochs, self.rank)

    def barrier(self, channel: Channel) -> None:
        """Of all ranks, on the current stream."""
        barrier.barrier(self.signals, channel)

    def arrive(self, channel: Channel) -> None:
        """The first half of a barrier."""
        barrier.arrive(self.signals, channel)

    def wait(self, channel: Channel) -> None:
        """The second half."""
        barrier.wait(self.signals, channel)

    def exchange_counts(self, counts: Tensor, all_counts: SharedTensor) -> None:
        """``counts [E]`` of every rank into everybody's ``all_counts [N, E]``, then a barrier."""
        exchange_counts(counts.contiguous(), all_counts.peers, self.signals, Channel.COUNTS)
