"""Launches of the address kernels. No constant depends on the number of tokens.

Shape legend: T tokens, k choices, R = T * k assignments, N ranks, E experts.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.launch import Launcher, cdiv, next_power_of_2
from lightning_swiftmoe.kernels.token_dispatch import address_triton
from lightning_swiftmoe.kernels.token_dispatch.token_plan import TokenPlan

_BLOCK = 1024  # assignments sorted by one program
_INTERPRETER_BLOCK = 64  # several blocks also in small tests
_PART = 16  # bins scanned by one program
_CHUNK = 128  # blocks of a scan's step

_count_blocks = Launcher(address_triton.count_blocks_kernel)
_scan_blocks = Launcher(address_triton.scan_blocks_kernel)
_address = Launcher(address_triton.address_kernel)


def address_tokens(topk_idx: Tensor, plan: TokenPlan, max_rows: int) -> tuple[Tensor, Tensor]:
    """Hosts and rows, int32 `[T, k]`; R must be at least 1."""
    num_ranks, num_experts = plan.send.shape
    num_assignments, device = topk_idx.numel(), topk_idx.device
    block = _BLOCK if device.type == "cuda" else _INTERPRETER_BLOCK
    num_blocks = cdiv(num_assignments, block)
    bins = next_power_of_2(num_experts + 1)
    counts, firsts = torch.empty(2, num_blocks, bins, dtype=torch.int32, device=device).unbind()
    host = torch.empty(topk_idx.shape, dtype=torch.int32, device=device)
    row = torch.empty_like(host)
    _count_blocks((num_blocks, 1, 1), topk_idx, counts, firsts, num_assignments, num_experts, BLOCK=block, BINS=bins)
    _scan_blocks((cdiv(bins, _PART), 1, 1), counts, firsts, num_blocks, BINS=bins, PART=_PART, CHUNK=_CHUNK)
    _address(
        (num_blocks, 1, 1),
        topk_idx,
        firsts,
        plan.kept,
        plan.send_until,
        plan.base,
        host,
        row,
        num_assignments,
        max_rows,
        num_ranks,
        num_experts,
        STEPS=(num_ranks - 1).bit_length(),
        BLOCK=block,
        BINS=bins,
    )
    return host, row
