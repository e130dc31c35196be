"""Shards and the experts' copies in slots, through memory that all ranks reach: weights are pushed, gradients pulled.

Nothing is packed: an owner writes its rows of an expert straight into every resident of it, and adds up its rows of
every resident's gradient straight from where the GEMM put them.

Shape legend: N ranks, E experts, R residents of a rank, B residents of all ranks together, P elements of one expert of
a parameter, of which this rank owns c from `start` on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device
from lightning_swiftmoe.kernels.indirect import Indirect


@dataclass(frozen=True)
class Residents:
    """Where each expert sits; ranks ascending, and so the order in which gradients are added up.

    Example: ranks with experts `[0, 2]` and `[2]`, E = 3: `first = [0, 1, 1, 3]`, `host = [0, 0, 1]`,
    `resident = [0, 1, 0]`.
    """

    first: Tensor  # [E + 1] int32: where each expert's part of the others begins
    host: Tensor  # [B] int32: rank
    resident: Tensor  # [B] int32: number there

    @classmethod
    def of(cls, experts: Sequence[Sequence[int]], num_experts: int) -> "Residents":
        """From the experts of every rank, ascending, on the host."""
        places: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
        for host, here in enumerate(experts):
            for resident, expert in enumerate(here):
                places[expert].append((host, resident))
        counts = torch.tensor([0, *(len(place) for place in places)])
        pairs = torch.tensor([pair for place in places for pair in place], dtype=torch.int32).view(-1, 2)
        return cls(counts.cumsum(0).int(), pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    @classmethod
    def within(cls, memory: Tensor, num_experts: int) -> "Residents":
        """Those that `pack` made `[E + 1 + 2 B]`, or that will be written there."""
        first, pairs = memory[: num_experts + 1], memory[num_experts + 1 :]
        return cls(first, *pairs.view(2, -1).unbind())

    def pack(self, room: int) -> Tensor:
        """`[E + 1 + 2 room]` int32 on the host; places beyond B are zeros that nobody reads."""
        spare = (0, room - self.host.shape[0])
        pad = torch.nn.functional.pad
        return torch.cat([self.first, pad(self.host, spare), pad(self.resident, spare)])

    @property
    def num_experts(self) -> int:
        """E."""
        return self.first.shape[0] - 1


def push_shards_reference(shard: Tensor, residents: Residents, peers: Sequence[Tensor], start: int) -> None:
    """`push_shards` into the peers' `[R, P]` tensors."""
    for expert, host, resident in _places(residents):
        peers[host][resident, start : start + shard.shape[1]] = shard[expert].to(peers[host].dtype)


def pull_shards_reference(
    total: Tensor, residents: Residents, peers: Sequence[Tensor], start: int, scale: float
) -> None:
    """`pull_shards` from the peers' `[R, P]` tensors."""
    total.zero_()
    for expert, host, resident in _places(residents):
        total[expert] += peers[host][resident, start : start + total.shape[1]].to(total.dtype)
    total *= scale


def _places(residents: Residents) -> list[tuple[int, int, int]]:
    first = residents.first.tolist()
    hosts, numbers = residents.host.tolist(), residents.resident.tolist()
    return [(e, hosts[at], numbers[at]) for e in range(len(first) - 1) for at in range(first[e], first[e + 1])]


def push_shards(shard: Tensor, residents: Residents, peers: Tensor, size: int, start: int, dtype: torch.dtype) -> None:
    """Write this rank's part of every expert into all of its residents, wherever they are; one kernel, with the cast.

    Args:
        shard: `[E, c]`, contiguous.
        residents: where they are, on the device.
        peers: `[N]` int64 on the device: address of every rank's contiguous `[>= R, P]` residents.
        size: P.
        start: of this rank's part.
        dtype: of the residents.
    """
    if shard.numel() == 0:
        return
    from lightning_swiftmoe.kernels.shards import peer_shards_triton

    with on_device(shard):
        peer_shards_triton.launch_push(shard, residents, peers, size, start, dtype)


def pull_shards(
    total: Tensor | Indirect,
    residents: Residents,
    peers: Tensor,
    size: int,
    start: int,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """`total[e] = scale * sum` of this rank's part of the gradients of all residents of e, in their order.

    Args:
        total: `[E, c]` fp32 (fp64), contiguous; added up in its dtype.
        residents: where they are, on the device.
        peers: `[N]` int64 on the device: address of every rank's contiguous `[>= R, P]` gradients.
        size: P.
        start: of this rank's part.
        dtype: of the gradients.
        scale: of the sum.
    """
    if total.numel() == 0:
        return
    from lightning_swiftmoe.kernels.shards import peer_shards_triton

    with on_device(peers):
        peer_shards_triton.launch_pull(total, residents, peers, size, start, dtype, scale)
