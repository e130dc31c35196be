"""The plan in plain torch, on any device, without a host synchronisation.

Shape legend: N ranks, E experts, R residents at most, P padded rows, A arrivals at most. `_ne` marks `[N, E]` tensors,
whose rank is the host, the source or both.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.token_dispatch.borrow import borrow_experts_reference
from lightning_swiftmoe.kernels.token_dispatch.split import split_exactly_reference
from lightning_swiftmoe.kernels.token_dispatch.token_plan import ROUNDING, Capacity, PlanSize, TokenPlan, Turns


def slot_capacity(factor: float, assignments: Tensor, num_slots: int) -> Tensor:
    """`ceil(round(factor * assignments / num_slots, 6))` for int64 assignments, as `placement.slot_capacity`.

    The quotient is the same fp64 number. Six decimals round a fraction to nothing exactly if it is at most half a
    millionth, and a tie cannot be: half a millionth is no binary fraction.
    """
    fair = factor * assignments.double() / num_slots
    whole = fair.floor()
    return whole.long() + (fair - whole > ROUNDING).long()


def kept_counts(counts: Tensor, replicas: Tensor, capacity: Capacity | None) -> Tensor:
    """`[N, E]` int64 assignments that every rank keeps, but for what ranks that pool their slots have no room for."""
    if capacity is None or capacity.scope == "pooled":
        return counts
    if capacity.scope == "rank":
        limit = slot_capacity(capacity.factor, counts.sum(dim=1), counts.shape[1])
        return torch.minimum(counts, limit[:, None])
    load = counts.sum(dim=0)
    limit = slot_capacity(capacity.factor, counts.sum(), capacity.num_slots) * replicas.long()
    return _in_proportion(counts, torch.minimum(limit, load), dim=0)


def host_share(load: Tensor, multiplicity: Tensor, replicas: Tensor) -> Tensor:
    """`[N, E]` int64 assignments that every rank processes when `load[E]` spread evenly over the replicas."""
    upper = multiplicity.long().cumsum(dim=0) * load // replicas.long()
    return _differences(upper)


def plan_tokens_reference(
    counts: Tensor,
    multiplicity: Tensor,
    replicas: Tensor,
    rank: int,
    size: PlanSize,
    capacity: Capacity | None,
    turns: Turns | None = None,
) -> TokenPlan:
    """`plan.plan_tokens` in plain torch; the exact split is made on the host."""
    kept = kept_counts(counts, replicas, capacity)
    load = kept.sum(dim=0)
    share = host_share(load, multiplicity, replicas)
    copies = lenders = multiplicity.new_empty(len(counts), 0)
    if turns is not None:
        share = split_exactly_reference(load, share.int(), turns)
        if size.max_copies:
            copies, lenders = borrow_experts_reference(share, multiplicity, size.max_copies, size.least_copied)
        share = share.long()
    if capacity is not None and capacity.scope == "pooled":
        room = slot_capacity(capacity.factor, counts.sum(), capacity.num_slots) * (capacity.num_slots // len(counts))
        share = _in_proportion(share, torch.minimum(share.sum(dim=1, keepdim=True), room), dim=1)
        kept = _in_proportion(counts, share.sum(dim=0), dim=0)
    local = torch.minimum(kept, share)
    # What does not stay is matched in rank order: ranges of sources beside ranges of hosts.
    source_end, host_end = (kept - local).cumsum(dim=0), (share - local).cumsum(dim=0)
    source_start, host_start = source_end - (kept - local), host_end - (share - local)
    stays = torch.zeros_like(local)
    stays[rank] = local[rank]
    send = _overlap(source_start[rank], source_end[rank], host_start, host_end) + stays
    recv = _overlap(host_start[rank], host_end[rank], source_start, source_end) + stays
    send_until, recv_until = _before(send, dim=0), _before(recv, dim=0)

    padded = (share + size.tile - 1) // size.tile * size.tile
    if size.layout == "padded":
        # Sources before this rank fill a host's share first, and a host that is one of them keeps its own.
        earlier = _overlap(torch.zeros_like(source_start[rank]), source_start[rank], host_start, host_end)
        earlier[:rank] += local[:rank]
        base = _starts(padded, multiplicity, copies).clamp_max(size.max_rows) + earlier - send_until
    else:
        base = _before(send.flatten(), dim=0).view_as(send) - send_until

    residents, starts, ends = _residents(multiplicity[rank], copies[rank].long(), padded[rank], share[rank], size)
    arrival_base = _before(recv.flatten(), dim=0).view_as(recv) - recv_until
    tile_expert, order, inverse = _rows(residents, starts, ends, recv_until, arrival_base, size)
    ints = (kept[rank], send, recv, send_until, base)
    sums = (share.sum(dim=1), send.sum(dim=1), recv.sum(dim=1), padded.sum(dim=1))
    rows = (residents, starts, ends, tile_expert, order, inverse)
    return TokenPlan(rank, size, *(t.int() for t in ints), *sums, *(t.int() for t in rows), copies, lenders)


def _starts(padded: Tensor, multiplicity: Tensor, copies: Tensor) -> Tensor:
    """`[N, E]` the row at which each expert begins at each host: residents ascending, then copies."""
    own = torch.where(multiplicity > 0, padded, 0)
    starts = _before(own, dim=1)
    borrowed = copies.long().clamp_min(0)
    rows = torch.where(copies >= 0, padded.gather(1, borrowed), 0)
    first = own.sum(dim=1, keepdim=True) + _before(rows, dim=1)
    for number in range(copies.shape[1]):
        named = borrowed[:, number, None]
        there = copies[:, number, None] >= 0
        starts.scatter_(1, named, torch.where(there, first[:, number, None], starts.gather(1, named)))
    return starts


def _residents(
    multiplicity: Tensor, copies: Tensor, padded: Tensor, share: Tensor, size: PlanSize
) -> tuple[Tensor, Tensor, Tensor]:
    """Residents `[R]`, starts `[R + 1]` and ends `[R]` of a rank, from its rows `[E]` of the `[N, E]` tensors."""
    own = size.max_residents - size.max_copies
    # Residents first, ascending, then as many others as it takes.
    experts = torch.sort((multiplicity == 0).int(), stable=True).indices[:own]
    experts = torch.nn.functional.pad(experts, (0, own - experts.shape[0]))
    there = torch.arange(own, device=experts.device) < (multiplicity > 0).sum()
    experts = torch.cat([experts, copies.clamp_min(0)])
    there = torch.cat([there, copies >= 0])
    rows = torch.where(there, padded[experts], 0)
    starts = torch.nn.functional.pad(rows.cumsum(dim=0), (1, 0)).clamp_max(size.max_rows)
    ends = (starts[:-1] + torch.where(there, share[experts], 0)).clamp_max(size.max_rows)
    return torch.where(there, experts, -1), starts, ends


def _rows(
    residents: Tensor, starts: Tensor, ends: Tensor, recv_until: Tensor, arrival_base: Tensor, size: PlanSize
) -> tuple[Tensor, Tensor, Tensor]:
    """The resident of each tile, the arrival in each row, and the row of each arrival."""
    row = torch.arange(size.max_rows, device=starts.device)
    # Empty residents share their successor's start: the last one that starts at or before the row owns it.
    owner = torch.searchsorted(starts[:-1].contiguous(), row, right=True) - 1
    place = row - starts[owner]
    real = row < ends[owner]
    if size.layout == "padded":
        order = torch.where(real, row, -1)
        return owner[:: size.tile], order, order
    # Rows at which each source's part of each resident starts, ascending; the last at or before the row owns it.
    experts = residents.clamp_min(0)
    part = (starts[:-1, None] + recv_until[:, experts].T).flatten()
    source = (torch.searchsorted(part, row, right=True) - 1) % recv_until.shape[0]
    expert = experts[owner]
    arrival = arrival_base[source, expert] + place
    # Beyond the arrival buffer nothing is read.
    real &= arrival < size.max_arrivals
    order = torch.where(real, arrival, -1)
    inverse = torch.full((size.max_arrivals + 1,), -1, dtype=torch.int64, device=starts.device)
    # Padding goes to one more element.
    inverse.scatter_(0, torch.where(real, arrival, size.max_arrivals), row)
    return owner[:: size.tile], order, inverse[:-1]


def _overlap(start: Tensor, end: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return (torch.minimum(end, ends) - torch.maximum(start, starts)).clamp_min(0)


def _before(values: Tensor, dim: int) -> Tensor:
    """The sum of everything before each element."""
    return values.cumsum(dim=dim) - values


def _in_proportion(parts: Tensor, wanted: Tensor, dim: int) -> Tensor:
    """Parts along `dim` that add up to what is wanted, at most their sum, each in proportion (cumulative rounding)."""
    upper = parts.cumsum(dim) * wanted // parts.sum(dim, keepdim=True).clamp_min(1)
    return _differences(upper, dim)


def _differences(upper: Tensor, dim: int = 0) -> Tensor:
    return upper.diff(dim=dim, prepend=torch.zeros_like(upper.narrow(dim, 0, 1)))
