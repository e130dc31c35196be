"""Moving residents' gradients to shard owners and weights back: the local halves of the two exchanges.

Shape legend: N ranks, R residents of this rank, P elements of one flattened expert, c = ceil(P / N) elements of a
shard. Rank j owns elements `[j * c, (j + 1) * c)` of every expert; the last shards are padded with zeros.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import has_triton, interpreted, on_device

_BLOCK = 1024  # elements moved by one program


def shard_size(num_elements: int, num_ranks: int) -> int:
    """Elements of one shard: `ceil(num_elements / num_ranks)`."""
    return -(-num_elements // num_ranks)


def pack_shards_reference(grads: Tensor, num_ranks: int, out_dtype: torch.dtype) -> Tensor:
    """Send order of `grads[R, P]`: `out[j, i] = grads[i, j * c : (j + 1) * c]`, zero padded, as `[N, R, c]`."""
    num_residents, num_elements = grads.shape
    size = shard_size(num_elements, num_ranks)
    padded = torch.nn.functional.pad(grads.to(out_dtype), (0, num_ranks * size - num_elements))
    return padded.view(num_residents, num_ranks, size).transpose(0, 1).contiguous()


def sum_shards_reference(blocks: Tensor, expert_ids: Tensor, num_experts: int, out_dtype: torch.dtype) -> Tensor:
    """Sum received `blocks[B, c]` by expert into `[E, c]`, wide, each expert's blocks in the order they stand."""
    wide = torch.promote_types(blocks.dtype, torch.float32)
    total = torch.zeros(num_experts, blocks.shape[1], dtype=wide, device=blocks.device)
    for block, expert in enumerate(expert_ids.tolist()):
        total[expert] += blocks[block].to(wide)
    return total.to(out_dtype)


def place_shards_reference(blocks: Tensor, num_elements: int, out_dtype: torch.dtype) -> Tensor:
    """Residents `[R, P]` from received `blocks[N, R, c]`: the inverse of `pack_shards`, padding trimmed."""
    num_ranks, num_residents, size = blocks.shape
    joined = blocks.transpose(0, 1).reshape(num_residents, num_ranks * size)
    return joined[:, :num_elements].to(out_dtype).contiguous()


def _use_triton(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and has_triton() and (tensor.device.type == "cuda" or interpreted())


def pack_shards(grads: Tensor, num_ranks: int, out_dtype: torch.dtype) -> Tensor:
    """`pack_shards_reference`, in one kernel on a GPU."""
    if not _use_triton(grads):
        return pack_shards_reference(grads, num_ranks, out_dtype)
    from lightning_swiftmoe.kernels import shards_triton

    num_residents, num_elements = grads.shape
    size = shard_size(num_elements, num_ranks)
    out = torch.empty(num_ranks, num_residents, size, dtype=out_dtype, device=grads.device)
    grid = (-(-size // _BLOCK), num_residents, num_ranks)
    with on_device(grads):
        shards_triton.pack_shards(grid, grads.contiguous(), out, num_residents, num_elements, size, BLOCK=_BLOCK)
    return out


def sum_shards(blocks: Tensor, expert_ids: Tensor, num_experts: int, out_dtype: torch.dtype) -> Tensor:
    """`sum_shards_reference`, in one kernel on a GPU and without waiting for it."""
    if blocks.numel() == 0:
        return torch.zeros(num_experts, blocks.shape[1], dtype=out_dtype, device=blocks.device)
    if not _use_triton(blocks):
        return sum_shards_reference(blocks, expert_ids, num_experts, out_dtype)
    import triton.language as tl

    from lightning_swiftmoe.kernels import shards_triton

    num_blocks, size = blocks.shape
    out = torch.empty(num_experts, size, dtype=out_dtype, device=blocks.device)
    ids = expert_ids.to(device=blocks.device, dtype=torch.int64, non_blocking=True)
    wide = tl.float64 if blocks.dtype == torch.float64 else tl.float32
    grid = (-(-size // _BLOCK), num_experts, 1)
    with on_device(blocks):
        shards_triton.sum_shards(grid, blocks.contiguous(), ids, out, num_blocks, size, WIDE=wide, BLOCK=_BLOCK)
    return out


def place_shards(blocks: Tensor, num_elements: int, out_dtype: torch.dtype) -> Tensor:
    """`place_shards_reference`, in one kernel on a GPU."""
    if not _use_triton(blocks) or num_elements == 0:
        return place_shards_reference(blocks, num_elements, out_dtype)
    from lightning_swiftmoe.kernels import shards_triton

    _, num_residents, size = blocks.shape
    out = torch.empty(num_residents, num_elements, dtype=out_dtype, device=blocks.device)
    grid = (-(-num_elements // _BLOCK), num_residents, 1)
    with on_device(blocks):
        shards_triton.place_shards(grid, blocks.contiguous(), out, num_residents, num_elements, size, BLOCK=_BLOCK)
    return out
