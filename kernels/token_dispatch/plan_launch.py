"""Launches of the plan's kernels. Grids and constants come from N, E and the `PlanSize` alone, never from counts.

Shape legend: N ranks, E experts, R residents at most, P padded rows, A arrivals at most.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.launch import Launcher, cdiv, next_power_of_2
from lightning_swiftmoe.kernels.token_dispatch import plan_triton
from lightning_swiftmoe.kernels.token_dispatch.borrow_launch import borrow_experts
from lightning_swiftmoe.kernels.token_dispatch.split_launch import split_exactly
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize, TokenPlan, Turns

_CHUNK = 512  # ranks that one step of the scan takes
_INTERPRETER_CHUNK = 4  # several steps also in small tests
_LANES = 128  # elements of a scan's tile, where ranks are few
_BLOCK = 1024  # arrivals cleared at a time by one program

_rank_totals = Launcher(plan_triton.rank_totals_kernel)
_even_shares = Launcher(plan_triton.even_shares_kernel)
_keep_within_ranks = Launcher(plan_triton.keep_within_ranks_kernel)
_scan_ranks = Launcher(plan_triton.scan_ranks_kernel)
_plan_hosts = Launcher(plan_triton.plan_hosts_kernel)
_name_rows = Launcher(plan_triton.name_rows_kernel)


def plan_tokens(
    counts: Tensor,
    multiplicity: Tensor,
    replicas: Tensor,
    rank: int,
    size: PlanSize,
    capacity: Capacity | None,
    turns: Turns | None = None,
) -> TokenPlan:
    """`plan.plan_tokens` in three kernels and more."""
    num_ranks, num_experts = counts.shape
    ints = torch.empty(10, num_ranks, num_experts, dtype=torch.int32, device=counts.device)
    kept, share, source_start, host_start, send, recv, send_until, base, recv_until, arrival_base = ints.unbind()
    sums = torch.empty(5, num_ranks, dtype=torch.int64, device=counts.device)
    totals, rank_load, send_rows, recv_rows, needed_rows = sums.unbind()
    rows = _row_tensors(size, counts.device)
    residents, starts, ends, tile_expert, order, inverse = rows
    bins = next_power_of_2(num_experts)
    slots = next_power_of_2(size.max_residents + 1)
    packed = size.layout == "packed"
    copies = lenders = torch.empty(num_ranks, 0, dtype=torch.int32, device=counts.device)

    if capacity is not None:
        ranks = max(2048 // bins, 1)
        _rank_totals((cdiv(num_ranks, ranks), 1, 1), counts, totals, num_ranks, num_experts, RANKS=ranks, BINS=bins)
    pooled = capacity is not None and capacity.scope == "pooled"
    if turns is not None or pooled:
        load = torch.empty(num_experts, dtype=torch.int64, device=counts.device)
        _scan(_even_shares, (counts, multiplicity, replicas, totals, load, share), capacity)
        if turns is not None:
            split_exactly(load, share, turns)
        if size.max_copies:
            copies, lenders = borrow_experts(share, multiplicity, size.max_copies, size.least_copied)
        if pooled:
            assert capacity is not None
            _keep_within_ranks(
                (num_ranks, 1, 1),
                share,
                totals,
                capacity.factor_bits,
                num_ranks,
                num_experts,
                capacity.num_slots,
                capacity.num_slots // num_ranks,
                BINS=bins,
                CHUNK=min(_CHUNK, next_power_of_2(num_ranks)),
            )
    given = turns is not None or pooled
    tensors = (counts, multiplicity, replicas, totals, kept, share, source_start, host_start)
    _scan(_scan_ranks, tensors, capacity, GIVEN=given)
    _plan_hosts(
        (num_ranks, 1, 1),
        multiplicity,
        copies,
        kept,
        share,
        source_start,
        host_start,
        send,
        recv,
        send_until,
        base,
        recv_until,
        arrival_base,
        rank_load,
        send_rows,
        recv_rows,
        needed_rows,
        residents,
        starts,
        ends,
        inverse,
        rank,
        num_ranks,
        num_experts,
        size.max_residents,
        size.max_rows,
        size.max_arrivals,
        num_warps=max(1, min(bins // 64, 8)),
        PACKED=packed,
        TILE=size.tile,
        BINS=bins,
        SLOTS=slots,
        BLOCK=_BLOCK,
        COPIES=size.max_copies,
    )
    _name_rows(
        (size.max_rows // size.tile, 1, 1),
        residents,
        starts,
        ends,
        recv_until,
        arrival_base,
        tile_expert,
        order,
        inverse,
        num_ranks,
        num_experts,
        size.max_residents,
        size.max_arrivals,
        PACKED=packed,
        STEPS=(num_ranks - 1).bit_length(),
        TILE=size.tile,
        SLOTS=slots,
    )
    sums_out = (rank_load, send_rows, recv_rows, needed_rows)
    return TokenPlan(rank, size, kept[rank], send, recv, send_until, base, *sums_out, *rows, copies, lenders)


def _row_tensors(size: PlanSize, device: torch.device) -> tuple[Tensor, ...]:
    """Residents, starts, ends, tile_expert, order and inverse; the padded layout's inverse is its order."""

    def empty(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int32, device=device)

    most = size.max_residents
    order = empty(size.max_rows)
    inverse = empty(size.max_arrivals) if size.layout == "packed" else order
    return empty(most), empty(most + 1), empty(most), empty(size.max_rows // size.tile), order, inverse


def _scan(kernel: Launcher, tensors: tuple[Tensor, ...], capacity: Capacity | None, **constants: bool) -> None:
    """One of the kernels that go along the rank axis, a few experts a program."""
    counts = tensors[0]
    num_ranks, num_experts = counts.shape
    scope = None if capacity is None else capacity.scope
    most = _CHUNK if counts.device.type == "cuda" else _INTERPRETER_CHUNK
    chunk = min(most, next_power_of_2(num_ranks))
    # Two experts a program keep most multiprocessors busy where the scan is long.
    experts = max(2, _LANES // chunk)
    kernel(
        (cdiv(num_experts, experts), 1, 1),
        *tensors,
        0 if capacity is None else capacity.factor_bits,
        num_ranks,
        num_experts,
        num_experts if capacity is None or scope == "rank" else capacity.num_slots,
        num_warps=max(1, chunk * experts // 128),
        CLUSTER_SCOPE=scope == "cluster",
        RANK_SCOPE=scope == "rank",
        EXPERTS=experts,
        CHUNK=chunk,
        **constants,
    )
