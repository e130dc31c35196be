"""Who sends how many tokens of which expert to whom, and to which row: the plan of a dispatch, made on the device.

Shape legend: N ranks, E experts.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device, uses_triton
from lightning_swiftmoe.kernels.token_dispatch.plan_reference import plan_tokens_reference
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize, TokenPlan, Turns


def plan_tokens(
    counts: Tensor,
    multiplicity: Tensor,
    replicas: Tensor,
    rank: int,
    size: PlanSize,
    capacity: Capacity | None = None,
    turns: Turns | None = None,
) -> TokenPlan:
    """This rank's plan: the numbers of `placement.TokenRule` and `plan_dispatch`, without the host.

    Three kernels on a GPU, one more each with a capacity, an exact split, copies, pooled slots, and an exact split or
    pooled slots. Neither launches nor compiled forms depend on counts.

    Args:
        counts: `[N, E]` int64 assignments that every rank routed, before drops.
        multiplicity: `[N, E]` int32 slots of rank j that hold expert e.
        replicas: `[E]` int32 slots that hold each expert, at least 1; the sum of multiplicity over ranks.
        rank: whose plan.
        size: sizes that are known on the host.
        capacity: None keeps all.
        turns: of the experts in an exact split over their hosts; None splits evenly over slots.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or copies without an exact split.
    """
    num_ranks, num_experts = counts.shape
    wanted = {"multiplicity": (multiplicity, (num_ranks, num_experts)), "replicas": (replicas, (num_experts,))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.dtype != torch.int32 or tensor.device != counts.device:
            raise ValueError(
                f"{name} must be int32 {list(shape)} on {counts.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if counts.dtype != torch.int64:
        raise ValueError(f"counts must be int64, got {counts.dtype}")
    if size.max_copies and turns is None:
        raise ValueError(f"copies are for what an exact split leaves uneven, got max_copies={size.max_copies} without")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be in 0 .. {num_ranks - 1}, got {rank}")
    tensors = (counts.contiguous(), multiplicity.contiguous(), replicas.contiguous())
    if not uses_triton(counts):
        return plan_tokens_reference(*tensors, rank, size, capacity, turns)
    from lightning_swiftmoe.kernels.token_dispatch import plan_launch

    with on_device(counts):
        return plan_launch.plan_tokens(*tensors, rank, size, capacity, turns)
