"""Residents' gradients to shards on the wire and weights back: the local halves of the two exchanges of expert state.

What travels between two ranks is rows, one for each resident, in which the parts of all parameters stand side by side.

Shape legend: N ranks, K parameters, R residents of this rank, P_k elements of one expert of parameter k, which rank j owns
from `bounds[k][j]` to `bounds[k][j + 1]`, E experts, B blocks on the wire: one for each resident of every rank, rank by
rank, C columns of a block: this rank's elements of all parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import has_triton, interpreted

Bounds = Sequence[Sequence[int]]


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


def gather_shards_reference(shards: Sequence[Tensor], expert_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks `[B, C]` from `shards[k][E, c_k]`: of each expert that is named, with the cast."""
    return torch.cat([shard.to(dtype) for shard in shards], dim=1)[expert_ids]


def sum_shards_reference(
    blocks: Tensor, sizes: Sequence[int], expert_ids: Tensor, num_experts: int, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    """Sum `blocks[B, C]` by expert and cut them into `[E, c_k]`, wide, each expert's blocks in the order they stand."""
    wide = torch.promote_types(blocks.dtype, torch.float32)
    total = torch.zeros(num_experts, blocks.shape[1], dtype=wide, device=blocks.device)
    for block, expert in enumerate(expert_ids.tolist()):
        total[expert] += blocks[block].to(wide)
    total *= scale
    return [part.to(dtype).contiguous() for part in total.split(list(sizes), dim=1)]


def _wire_parts(flat: Tensor, num_residents: int, bounds: Bounds):  # type: ignore[no-untyped-def]
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
    from lightning_swiftmoe.kernels import expert_shards_triton as kernels

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
    from lightning_swiftmoe.kernels import expert_shards_triton as kernels

    for k, resident in enumerate(residents):
        kernels.launch_wire(resident, arrived, k, bounds, to_wire=False)


def gather_shards(shards: Sequence[Tensor], expert_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """`gather_shards_reference`, in one kernel a parameter on a GPU."""
    if not _use_triton(shards[0]):
        return gather_shards_reference(shards, expert_ids, dtype)
    from lightning_swiftmoe.kernels import expert_shards_triton as kernels

    columns = sum(shard.shape[1] for shard in shards)
    out = torch.empty(expert_ids.shape[0], columns, dtype=dtype, device=shards[0].device)
    first = 0
    for shard in shards:
        kernels.launch_gather(shard, expert_ids, out, first)
        first += shard.shape[1]
    return out


def sum_shards(
    blocks: Tensor, sizes: Sequence[int], expert_ids: Tensor, num_experts: int, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    """`sum_shards_reference`, in one kernel a parameter on a GPU and without waiting for it."""
    if not _use_triton(blocks):
        return sum_shards_reference(blocks, sizes, expert_ids, num_experts, scale, dtype)
    from lightning_swiftmoe.kernels import expert_shards_triton as kernels

    totals = []
    first = 0
    for size in sizes:
        total = torch.empty(num_experts, size, dtype=dtype, device=blocks.device)
        kernels.launch_sum(blocks, expert_ids, total, first, scale)
        totals.append(total)
        first += size
    return totals
