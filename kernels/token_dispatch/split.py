"""The exact split of experts over their hosts, made on the device: `placement.exact_split` without the host.

Shape legend: N ranks, E experts, C turns of a round.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device, uses_triton
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Turns
from lightning_swiftmoe.placement.exact_split import pour_in_turns


def split_exactly(load: Tensor, share: Tensor, turns: Turns) -> Tensor:
    """`share`, changed in place from even over the slots to as even over the ranks as the placement allows.

    One program on a GPU; nothing depends on the loads but how long it takes.

    Args:
        load: `[E]` int64 assignments of each expert, below 2**30 together.
        share: `[N, E]` int32 of `placement.host_share(load)`.
        turns: of the placement's experts.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    num_ranks, num_experts = share.shape
    if share.dtype != torch.int32 or not share.is_contiguous():
        raise ValueError(f"share must be contiguous int32, got {share.dtype} with strides {share.stride()}")
    if load.shape != (num_experts,) or load.dtype != torch.int64:
        raise ValueError(f"load must be int64 [{num_experts}], got {load.dtype} {list(load.shape)}")
    table = turns.table
    if table.dim() != 3 or table.shape[1:] != (3, num_ranks) or table.dtype != torch.int32 or not table.is_contiguous():
        raise ValueError(f"turns must be contiguous int32 [C, 3, {num_ranks}], got {table.dtype} {list(table.shape)}")
    if not uses_triton(share):
        return split_exactly_reference(load, share, turns)
    from lightning_swiftmoe.kernels.token_dispatch import split_launch

    with on_device(share):
        split_launch.split_exactly(load, share, turns)
    return share


def split_exactly_reference(load: Tensor, share: Tensor, turns: Turns) -> Tensor:
    """`split_exactly` on the host."""
    num_experts = share.shape[1]
    in_turn = []
    for pairs in turns.table[: int(turns.number)].cpu()[:, 0]:
        pairs = pairs[pairs >= 0]
        experts = pairs % num_experts
        in_turn += [(int(e), (pairs[experts == e] // num_experts).numpy()) for e in experts.unique_consecutive()]
    quota = share.long().cpu().numpy()
    pour_in_turns(quota, load.cpu().numpy(), in_turn)
    return share.copy_(torch.from_numpy(quota))
