"""Moving residents' gradients to shard owners and weights back: the local halves of the two exchanges, plain torch.

Shape legend: N ranks, R residents of this rank, P elements of one flattened expert, c = ceil(P / N) elements of a
shard. Rank j owns elements `[j * c, (j + 1) * c)` of every expert; the last shards are padded with zeros.
"""

import torch
from torch import Tensor


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
