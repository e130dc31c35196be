"""The launch of the exact split. Nothing depends on loads or on how many turns there are.

Shape legend: N ranks, E experts, C turns.
"""

from torch import Tensor

from lightning_swiftmoe.kernels.launch import Launcher, next_power_of_2
from lightning_swiftmoe.kernels.token_dispatch import split_triton
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Turns
from lightning_swiftmoe.placement.exact_split import EVEN_ENOUGH, FURTHER, ROUNDS

_TILE = 512  # shares that a warp adds up at a time, in registers

_exact_split = Launcher(split_triton.exact_split_kernel)


def split_exactly(load: Tensor, share: Tensor, turns: Turns) -> None:
    """`split.split_exactly` in one program."""
    num_ranks, num_experts = share.shape
    lanes = next_power_of_2(num_ranks)
    num_warps = max(1, min(lanes // 128, 8))
    numerator, denominator = FURTHER
    _exact_split(
        (1, 1, 1),
        load,
        share,
        turns.table,
        turns.number,
        num_ranks,
        num_experts,
        num_warps=num_warps,
        ROUNDS=ROUNDS,
        NUMERATOR=numerator,
        DENOMINATOR=denominator,
        EVEN_ENOUGH=EVEN_ENOUGH,
        LANES=lanes,
        EXPERTS=max(_TILE * num_warps // lanes, 1),
    )
