"""Waiting for the other GPUs on the device, and telling them how many tokens each expert has. Needs Triton.

All ranks call in the same order on each channel, from one stream at a time. A rank that never comes leaves the others
waiting for ever; there is no time limit on the device.

Shape legend: N ranks, C channels, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device
from lightning_swiftmoe.kernels.launch import Launcher, next_power_of_2
from lightning_swiftmoe.kernels.token_dispatch import barrier_triton

_barrier = Launcher(barrier_triton.barrier_kernel)
_arrive = Launcher(barrier_triton.arrive_kernel)
_wait = Launcher(barrier_triton.wait_kernel)
_exchange_counts = Launcher(barrier_triton.exchange_counts_kernel)


@dataclass(frozen=True)
class Signals:
    """Signal pads of all ranks, as this rank sees them.

    Args:
        pads: `[N]` int64 on the device: address of every rank's pad of `pad_size(N, C)` int32, zero before the first
            barrier of any rank. A signal pad of symmetric memory is one, if nobody else uses that part of it.
        epochs: `[C]` int32 on the device, zeros at first: barriers passed on each channel. On the device, so that a
            captured CUDA graph counts on.
        rank: this rank.
    """

    pads: Tensor
    epochs: Tensor
    rank: int

    @classmethod
    def of(cls, pad_ptrs: list[int], rank: int, num_channels: int, device: torch.device) -> "Signals":
        """Signals over pads at these addresses. Copies to the device: call it at set-up."""
        pads = torch.tensor(pad_ptrs, dtype=torch.int64, device=device)
        return cls(pads, torch.zeros(num_channels, dtype=torch.int32, device=device), rank)


def pad_size(num_ranks: int, num_channels: int) -> int:
    """Int32 elements of a pad: one signal for each channel and source."""
    return num_ranks * num_channels


def barrier(signals: Signals, channel: int = 0) -> None:
    """Work after this on the stream starts when all ranks have finished theirs before it, and sees what they wrote."""
    _launch(_barrier, signals, channel)


def arrive(signals: Signals, channel: int = 0) -> None:
    """The first half of a `barrier`; what comes between it and `wait` overlaps with the other ranks' way here."""
    _launch(_arrive, signals, channel)


def wait(signals: Signals, channel: int = 0) -> None:
    """The second half of a `barrier`. Between the halves the channel takes part in no other."""
    _launch(_wait, signals, channel)


def _launch(kernel: Launcher, signals: Signals, channel: int) -> None:
    num_ranks = signals.pads.shape[0]
    with on_device(signals.pads):
        kernel(
            (1, 1, 1),
            signals.pads,
            signals.epochs,
            signals.rank,
            channel,
            num_ranks,
            num_warps=_warps(num_ranks),
            LANES=next_power_of_2(num_ranks),
        )


def exchange_counts(counts: Tensor, peer_counts: Tensor, signals: Signals, channel: int = 0) -> None:
    """Write `counts[E]` into row `rank` of every peer's `[N, E]` int64 counts, and wait for all peers to do so.

    A peer may write the next counts as soon as it has passed: two buffers, used in turn, keep those being read.

    Args:
        counts: `[E]` integers, contiguous.
        peer_counts: `[N]` int64 on the device: address of every rank's buffer.
        signals: the pads.
        channel: whose signals to use.
    """
    num_ranks, num_experts = signals.pads.shape[0], counts.shape[0]
    with on_device(counts):
        _exchange_counts(
            (1, 1, 1),
            counts,
            peer_counts,
            signals.pads,
            signals.epochs,
            signals.rank,
            channel,
            num_ranks,
            num_experts,
            num_warps=_warps(num_ranks),
            LANES=next_power_of_2(num_ranks),
            BINS=next_power_of_2(num_experts),
        )


def _warps(num_ranks: int) -> int:
    """Enough for a lane of its own for each rank, as far as a block goes."""
    return min(max(next_power_of_2(num_ranks) // 32, 4), 32)
