"""Residents' gradients to shards on the wire and weights back: the local halves of the two exchanges of expert state.

What travels between two ranks is rows, one for each resident, in which the parts of all parameters stand side by side.

Shape legend: N ranks, K parameters, R residents of this rank, P_k elements of one expert of parameter k, of which rank
j owns `bounds[k][j]` to `bounds[k][j + 1]`, E experts, B blocks on the wire: one for each resident of every rank, rank
by rank, C columns of a block: this rank's elements of all parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import has_triton, interpreted, to_device

Bounds = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Blocks:
    """Which expert each block on the wire is of, on the device of the blocks.

    Example: ranks with residents `[0, 2]` and `[2]` have blocks of experts `[0, 2, 2]`; with E = 3, `order = [0, 1, 2]`
    and `first = [0, 1, 1, 3]`.
    """

    experts: Tensor  # [B] int64
    order: Tensor  # [B] int64: blocks by expert, those of one expert in the order they stand
    first: Tensor  # [E + 1] int64: where each expert's part of `order` begins

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> "Blocks":
        """From the experts `[B]`, on the host."""
        order = torch.sort(experts, stable=True).indices
        counts = torch.bincount(experts, minlength=num_experts)
        first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(experts, order, first)

    def to(self, device: torch.device) -> "Blocks":
        """The same on `device`; from pinned memory to a GPU nobody waits."""
        return Blocks(*(to_device(t, device) for t in (self.experts, self.order, self.first)))

    @property
    def num_experts(self) -> int:
        """E."""
        return self.first.shape[0] - 1


def pack_shards_reference(grads: Sequence[Tensor], bounds: Bounds) -> Tensor:
    """`[R * sum P_k]` in send order from `grads[k][R, P_k]`: for each rank its part of every resident."""
    num_residents = grads[0].shape[0]
    out = grads[0].new_empty(num_residents * sum(grad.shape[1] for grad in grads))
    for part, k, start, stop in _wire_parts(out, num_residents, bounds):
        part.copy_(grads[k][:, start:stop])
    return out


def place_shards_reference(arrived: Tensor, residents: Sequence[Tensor], bounds: Bounds) -> None:
    """The inverse of `pack_shards`: fill `residents[k][R, P_k]`, with the cast, from `arrived[R * sum P_k]`."""
    for part, k, start, stop in _wire_parts(arrived, residents[0].shape[0], bounds):
        residents[k][:, start:stop].copy_(part)


def gather_shards_reference(shards: Sequence[Tensor], blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Blocks `[B, C]` from `shards[k][E, c_k]`: of each expert that is named, with the cast."""
    return torch.cat([shard.to(dtype) for shard in shards], dim=1)[blocks.experts]


def sum_shards_reference(
    arrived: Tensor, sizes: Sequence[int], blocks: Blocks, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    """Sum `arrived[B, C]` by expert and cut it into `[E, c_k]`, wide, each expert's blocks in the order they stand."""
    wide = torch.promote_types(arrived.dtype, torch.float32)
    total = torch.zeros(blocks.num_experts, arrived.shape[1], dtype=wide, device=arrived.device)
    for block, expert in enumerate(blocks.experts.tolist()):
        total[expert] += arrived[block].to(wide)
    total *= scale
    return [part.to(dtype).contiguous() for part in total.split(list(sizes), dim=1)]


def _wire_parts(flat: Tensor, num_residents: int, bounds: Bounds) -> Iterator[tuple[Tensor, int, int, int]]:
    """Views `[R, size]` of the wire: for each rank and parameter `(view, k, start, stop)`."""
    offset = 0
    for rank in range(len(bounds[0]) - 1):
        cuts = [(bound[rank], bound[rank + 1]) for bound in bounds]
        columns = sum(stop - start for start, stop in cuts)
        rows = flat[offset : offset + num_residents * columns].view(num_residents, columns)
        offset += rows.numel()
        column = 0
        for k, (start, stop) in enumerate(cuts):
            yield rows[:, column : column + stop - start], k, start, stop
            column += stop - start


def _use_triton(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and has_triton() and (tensor.device.type == "cuda" or interpreted())


def pack_shards(grads: Sequence[Tensor], bounds: Bounds) -> Tensor:
    """`pack_shards_reference`, in one kernel a parameter on a GPU."""
    if not _use_triton(grads[0]):
        return pack_shards_reference(grads, bounds)
    from lightning_swiftmoe.kernels.shards import expert_shards_triton as kernels

    num_residents = grads[0].shape[0]
    out = grads[0].new_empty(num_residents * sum(grad.shape[1] for grad in grads))
    for k, grad in enumerate(grads):
        kernels.launch_wire(grad.contiguous(), out, k, bounds, to_wire=True)
    return out


def place_shards(arrived: Tensor, residents: Sequence[Tensor], bounds: Bounds) -> None:
    """`place_shards_reference`, in one kernel a parameter on a GPU. Residents are contiguous."""
    if not _use_triton(arrived):
        place_shards_reference(arrived, residents, bounds)
        return
    from lightning_swiftmoe.kernels.shards import expert_shards_triton as kernels

    for k, resident in enumerate(residents):
        kernels.launch_wire(resident, arrived, k, bounds, to_wire=False)


def gather_shards(shards: Sequence[Tensor], blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """`gather_shards_reference`, in one kernel a parameter on a GPU."""
    if not _use_triton(shards[0]):
        return gather_shards_reference(shards, blocks, dtype)
    from lightning_swiftmoe.kernels.shards import expert_shards_triton as kernels

    columns = sum(shard.shape[1] for shard in shards)
    out = torch.empty(blocks.experts.shape[0], columns, dtype=dtype, device=shards[0].device)
    first = 0
    for shard in shards:
        kernels.launch_gather(shard, blocks.experts, out, first)
        first += shard.shape[1]
    return out


def sum_shards(arrived: Tensor, sizes: Sequence[int], blocks: Blocks, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """`sum_shards_reference`, in one kernel a parameter on a GPU and without waiting for it."""
    if not _use_triton(arrived):
        return sum_shards_reference(arrived, sizes, blocks, scale, dtype)
    from lightning_swiftmoe.kernels.shards import expert_shards_triton as kernels

    totals = []
    first = 0
    for size in sizes:
        total = torch.empty(blocks.num_experts, size, dtype=dtype, device=arrived.device)
        kernels.launch_sum(arrived, blocks.order, blocks.first, total, first, scale)
        totals.append(total)
        first += size
    return totals
