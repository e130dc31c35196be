"""The plan in three or four kernels: totals of ranks, one scan over ranks, one pass over hosts, names of rows. Up to
four more where who processes what is not the even split within the capacity of experts.

Only the scan goes along the rank axis. It leaves four running numbers per rank and expert, and what this rank sends
to host j, what of it goes to hosts before j, and what stands before it at host j are all overlaps of two ranges.

Shape legend: N ranks, E experts in a vector of BINS, R residents in a vector of SLOTS > R, P padded rows in tiles of
TILE, A arrivals. The scan takes EXPERTS experts a program and CHUNK ranks at a time.
"""

import triton
import triton.language as tl


@triton.jit
def _slot_capacity(factor_bits, assignments, num_slots):
    """`ceil(round(factor * assignments / num_slots, 6))`; see `plan_reference.slot_capacity`."""
    factor = factor_bits.to(tl.float64, bitcast=True)
    fair = factor * assignments.to(tl.float64) / num_slots.to(tl.float64)
    whole = tl.floor(fair)
    rounding = tl.full([], 5e-7, tl.float64)
    return whole.to(tl.int64) + (fair - whole > rounding).to(tl.int64)


@triton.jit
def rank_totals_kernel(counts, totals, N, E, RANKS: tl.constexpr, BINS: tl.constexpr):
    """`totals[j]`: assignments that rank j routed."""
    rank = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    expert = tl.arange(0, BINS)
    mask = (rank < N)[:, None] & (expert < E)[None, :]
    count = tl.load(counts + rank.to(tl.int64)[:, None] * E + expert[None, :], mask=mask, other=0)
    tl.store(totals + rank, tl.sum(count, axis=1), mask=rank < N)


@triton.jit
def _sum_totals(totals, N, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.int64)
    for first in range(0, N, CHUNK):
        rank = first + tl.arange(0, CHUNK)
        total += tl.load(totals + rank, mask=rank < N, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _counted(counts, totals, factor_bits, rank, at, mask, N, num_slots, RANK_SCOPE: tl.constexpr):
    """Assignments that count towards an expert's load: with a capacity of ranks, what each rank keeps."""
    count = tl.load(counts + at, mask=mask, other=0)
    if RANK_SCOPE:
        limit = _slot_capacity(factor_bits, tl.load(totals + rank, mask=rank < N, other=0), num_slots)
        count = tl.minimum(count, limit[:, None])
    return count


@triton.jit
def _sum_of_ranks(share, expert, there, N, E, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    total = tl.zeros([EXPERTS], tl.int64)
    for first in range(0, N, CHUNK):
        rank = first + tl.arange(0, CHUNK)
        at = rank.to(tl.int64)[:, None] * E + expert[None, :]
        total += tl.sum(tl.load(share + at, mask=(rank < N)[:, None] & there[None, :], other=0).to(tl.int64), axis=0)
    return total


@triton.jit(do_not_specialize=["factor_bits", "num_slots"])
def even_shares_kernel(
    counts, multiplicity, replicas, totals, load, share, factor_bits, N, E, num_slots,
    CLUSTER_SCOPE: tl.constexpr, RANK_SCOPE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What is to be processed of each expert, within its capacity if it has one, and that evenly over its slots."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    there = expert < E
    cap = tl.zeros([EXPERTS], tl.int64)
    for first in range(0, N, CHUNK):
        rank = first + tl.arange(0, CHUNK)
        at = rank.to(tl.int64)[:, None] * E + expert[None, :]
        mask = (rank < N)[:, None] & there[None, :]
        cap += tl.sum(_counted(counts, totals, factor_bits, rank, at, mask, N, num_slots, RANK_SCOPE), axis=0)
    slots = tl.load(replicas + expert, mask=there, other=1).to(tl.int64)
    if CLUSTER_SCOPE:
        cap = tl.minimum(cap, _slot_capacity(factor_bits, _sum_totals(totals, N, CHUNK), num_slots) * slots)
    tl.store(load + expert, cap, mask=there)
    hosted = tl.zeros([EXPERTS], tl.int64)
    for first in range(0, N, CHUNK):
        rank = first + tl.arange(0, CHUNK)
        at = rank.to(tl.int64)[:, None] * E + expert[None, :]
        mask = (rank < N)[:, None] & there[None, :]
        here = tl.load(multiplicity + at, mask=mask, other=0).to(tl.int64)
        until = tl.cumsum(here, axis=0) + hosted[None, :]
        part = until * cap[None, :] // slots[None, :] - (until - here) * cap[None, :] // slots[None, :]
        hosted += tl.sum(here, axis=0)
        tl.store(share + at, part.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["factor_bits", "num_slots", "slots_per_rank"])
def keep_within_ranks_kernel(
    share, totals, factor_bits, N, E, num_slots, slots_per_rank, BINS: tl.constexpr, CHUNK: tl.constexpr
):
    """What rank = program has room for of its `share`, from all its experts in proportion."""
    room = _slot_capacity(factor_bits, _sum_totals(totals, N, CHUNK), num_slots) * slots_per_rank
    expert = tl.arange(0, BINS)
    at = share + tl.program_id(0).to(tl.int64) * E + expert
    offered = tl.load(at, mask=expert < E, other=0).to(tl.int64)
    until = tl.cumsum(offered, axis=0)
    total = tl.sum(offered, axis=0)
    room = tl.minimum(total, room)
    total = tl.maximum(total, 1)
    tl.store(at, (until * room // total - (until - offered) * room // total).to(tl.int32), mask=expert < E)


@triton.jit(do_not_specialize=["factor_bits", "num_slots"])
def scan_ranks_kernel(
    counts, multiplicity, replicas, totals, kept, share, source_start, host_start, factor_bits, N, E, num_slots,
    CLUSTER_SCOPE: tl.constexpr, RANK_SCOPE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """What every rank keeps and processes of each expert, and how much of that comes before it in rank order.

    `source_start` counts kept assignments that leave their rank, `host_start` the places that they find. `GIVEN`: who
    processes what is there already, and what of an expert nobody processes is not kept.
    """
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    there = expert < E
    load = tl.zeros([EXPERTS], tl.int64)
    for first in range(0, N, CHUNK):
        rank = first + tl.arange(0, CHUNK)
        at = rank.to(tl.int64)[:, None] * E + expert[None, :]
        mask = (rank < N)[:, None] & there[None, :]
        load += tl.sum(_counted(counts, totals, factor_bits, rank, at, mask, N, num_slots, RANK_SCOPE), axis=0)

    slots = tl.load(replicas + expert, mask=there, other=1).to(tl.int64)
    cap = load
    if GIVEN:
        cap = _sum_of_ranks(share, expert, there, N, E, EXPERTS, CHUNK)
    elif CLUSTER_SCOPE:
        cap = tl.minimum(load, _slot_capacity(factor_bits, _sum_totals(totals, N, CHUNK), num_slots) * slots)
    divisor = tl.maximum(load, 1)

    routed = tl.zeros([EXPERTS], tl.int64)
    hosted = tl.zeros([EXPERTS], tl.int64)
    leaving = tl.zeros([EXPERTS], tl.int64)
    places = tl.zeros([EXPERTS], tl.int64)
    for first in range(0, N, CHUNK):
        rank = first + tl.arange(0, CHUNK)
        at = rank.to(tl.int64)[:, None] * E + expert[None, :]
        mask = (rank < N)[:, None] & there[None, :]
        count = _counted(counts, totals, factor_bits, rank, at, mask, N, num_slots, RANK_SCOPE)
        keep = count
        if CLUSTER_SCOPE or GIVEN:
            until = tl.cumsum(count, axis=0) + routed[None, :]
            keep = until * cap[None, :] // divisor[None, :] - (until - count) * cap[None, :] // divisor[None, :]
            routed += tl.sum(count, axis=0)
        if GIVEN:
            part = tl.load(share + at, mask=mask, other=0).to(tl.int64)
        else:
            here = tl.load(multiplicity + at, mask=mask, other=0).to(tl.int64)
            until = tl.cumsum(here, axis=0) + hosted[None, :]
            part = until * cap[None, :] // slots[None, :] - (until - here) * cap[None, :] // slots[None, :]
            hosted += tl.sum(here, axis=0)

        local = tl.minimum(keep, part)
        leave, place = keep - local, part - local
        tl.store(kept + at, keep.to(tl.int32), mask=mask)
        if not GIVEN:
            tl.store(share + at, part.to(tl.int32), mask=mask)
        before = tl.cumsum(leave, axis=0) - leave + leaving[None, :]
        tl.store(source_start + at, before.to(tl.int32), mask=mask)
        before = tl.cumsum(place, axis=0) - place + places[None, :]
        tl.store(host_start + at, before.to(tl.int32), mask=mask)
        leaving += tl.sum(leave, axis=0)
        places += tl.sum(place, axis=0)


@triton.jit
def _overlap(start, length, other_start, other_length):
    end = tl.minimum(start + length, other_start + other_length)
    return tl.maximum(end - tl.maximum(start, other_start), 0)


@triton.jit
def _starts(multiplicity, copies, padded, mask, BINS: tl.constexpr, COPIES: tl.constexpr):
    """Where each expert's rows begin at the host of these: residents ascending, then copies."""
    expert = tl.arange(0, BINS)
    own = padded
    if COPIES > 0:
        own = tl.where(tl.load(multiplicity + expert, mask=mask, other=0) > 0, padded, 0)
    start = tl.cumsum(own, axis=0) - own
    until = tl.sum(own, axis=0)
    for number in tl.static_range(COPIES):
        is_copy = expert == tl.load(copies + number)
        start = tl.where(is_copy, until, start)
        until += tl.sum(tl.where(is_copy, padded, 0), axis=0)
    return start


@triton.jit
def _store_residents(
    multiplicity, copies, start, padded, share, residents, starts, ends, mask, R, P,
    BINS: tl.constexpr, SLOTS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """This rank's residents, one after the other, and its copies; those that do not exist are empty."""
    expert = tl.arange(0, BINS)
    slot = tl.arange(0, SLOTS)
    own = R - COPIES
    here = (tl.load(multiplicity + expert, mask=mask, other=0) > 0).to(tl.int32)
    index = tl.cumsum(here, axis=0) - here
    listed = (here > 0) & (index < own)
    tl.store(residents + index, expert, mask=listed)
    tl.store(starts + index, tl.minimum(start, P).to(tl.int32), mask=listed)
    tl.store(ends + index, tl.minimum(start + share, P).to(tl.int32), mask=listed)
    missing = slot >= tl.sum(here, axis=0)
    nothing = tl.zeros([SLOTS], tl.int32)
    until = tl.sum(tl.where(here > 0, padded, 0), axis=0)
    end = tl.minimum(until, P).to(tl.int32) + nothing
    tl.store(residents + slot, nothing - 1, mask=missing & (slot < own))
    tl.store(ends + slot, end, mask=missing & (slot < own))
    tl.store(starts + slot, end, mask=missing & (slot <= own))
    for number in tl.static_range(COPIES):
        chosen = tl.load(copies + number)
        rows = tl.sum(tl.where(expert == chosen, padded, 0), axis=0)
        amount = tl.sum(tl.where(expert == chosen, share, 0), axis=0)
        tl.store(residents + own + number, chosen)
        tl.store(ends + own + number, tl.minimum(until + amount, P).to(tl.int32))
        until += rows
        tl.store(starts + own + number + 1, tl.minimum(until, P).to(tl.int32))


@triton.jit
def _clear_part(inverse, part, num_parts, A, BLOCK: tl.constexpr):
    """-1 for every arrival, as long as no row is known to want it."""
    for first in range(part * BLOCK, A, num_parts * BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(inverse + at, tl.full([BLOCK], -1, tl.int32), mask=at < A)


@triton.jit(do_not_specialize=["rank", "P", "A"])
def plan_hosts_kernel(
    multiplicity, copies, kept, share, source_start, host_start, send, recv, send_until, base, recv_until, arrival_base,
    rank_load, send_rows, recv_rows, needed_rows, residents, starts, ends, inverse, rank, N, E, R, P, A,
    PACKED: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    """What this rank sends to and receives from peer j = program, and where it stands there."""
    peer = tl.program_id(0)
    expert = tl.arange(0, BINS)
    mask = expert < E
    at = peer.to(tl.int64) * E + expert
    own = rank.to(tl.int64) * E + expert
    peer_kept = tl.load(kept + at, mask=mask, other=0)
    peer_share = tl.load(share + at, mask=mask, other=0)
    peer_source = tl.load(source_start + at, mask=mask, other=0)
    peer_host = tl.load(host_start + at, mask=mask, other=0)
    own_kept = tl.load(kept + own, mask=mask, other=0)
    own_share = tl.load(share + own, mask=mask, other=0)
    own_source = tl.load(source_start + own, mask=mask, other=0)
    own_host = tl.load(host_start + own, mask=mask, other=0)

    peer_local = tl.minimum(peer_kept, peer_share)
    own_local = tl.minimum(own_kept, own_share)
    peer_leave, peer_places = peer_kept - peer_local, peer_share - peer_local
    own_leave, own_places = own_kept - own_local, own_share - own_local
    stays = tl.where(peer == rank, own_local, 0)
    stayed = tl.where(peer > rank, own_local, 0)
    sent = _overlap(own_source, own_leave, peer_host, peer_places) + stays
    received = _overlap(own_host, own_places, peer_source, peer_leave) + stays
    # What went to the peers before: everything that overlaps the places before this peer's.
    sent_before = _overlap(own_source, own_leave, 0, peer_host) + stayed
    received_before = _overlap(own_host, own_places, 0, peer_source) + stayed
    tl.store(send + at, sent, mask=mask)
    tl.store(recv + at, received, mask=mask)
    tl.store(send_until + at, sent_before, mask=mask)
    tl.store(rank_load + peer, tl.sum(peer_share.to(tl.int64), axis=0))
    tl.store(send_rows + peer, tl.sum(sent.to(tl.int64), axis=0))
    tl.store(recv_rows + peer, tl.sum(received.to(tl.int64), axis=0))
    padded = ((peer_share + TILE - 1) // TILE * TILE).to(tl.int64)
    tl.store(needed_rows + peer, tl.sum(padded, axis=0))
    start = _starts(multiplicity + at - expert, copies + peer * COPIES, padded, mask, BINS, COPIES)

    if PACKED:
        # All that goes to earlier hosts, then this host's earlier experts.
        first = tl.sum(sent_before, axis=0) + tl.cumsum(sent, axis=0) - sent
        tl.store(base + at, first - sent_before, mask=mask)
        first = tl.sum(received_before, axis=0) + tl.cumsum(received, axis=0) - received
        tl.store(arrival_base + at, first - received_before, mask=mask)
        tl.store(recv_until + at, received_before, mask=mask)
        _clear_part(inverse, peer, N, A, BLOCK)
    else:
        # The peer's own come in their rank's turn, the others in rank order.
        earlier = _overlap(peer_host, peer_places, 0, own_source) + tl.where(peer < rank, peer_local, 0)
        tl.store(base + at, tl.minimum(start, P).to(tl.int32) + earlier - sent_before, mask=mask)
    if peer == rank:
        _store_residents(
            multiplicity + at - expert, copies + peer * COPIES, start, padded, peer_share, residents, starts, ends,
            mask, R, P, BINS, SLOTS, COPIES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["A"])
def name_rows_kernel(
    residents, starts, ends, recv_until, arrival_base, tile_expert, order, inverse, N, E, R, A,
    PACKED: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The resident of a tile = program, and the arrival of each of its rows."""
    tile = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    start = tl.load(starts + slot, mask=slot < R, other=2147483647)
    # Empty residents share their successor's start: the last that starts at or before the tile owns it.
    owner = tl.sum((start <= tile * TILE).to(tl.int32), axis=0) - 1
    tl.store(tile_expert + tile, owner)
    row = tile * TILE + tl.arange(0, TILE)
    real = row < tl.load(ends + owner)
    arrival = row
    if PACKED:
        column = tl.maximum(tl.load(residents + owner), 0)
        place = row - tl.load(starts + owner)
        source = tl.zeros([TILE], tl.int32)
        # Halving steps to the last source before which no more than `place` rows arrive.
        for step in tl.static_range(STEPS):
            further = source + (1 << (STEPS - 1 - step))
            inside = real & (further < N)
            until = tl.load(recv_until + further.to(tl.int64) * E + column, mask=inside, other=2147483647)
            source = tl.where(until <= place, further, source)
        arrival = tl.load(arrival_base + source.to(tl.int64) * E + column, mask=real, other=0) + place
        # Beyond the arrival buffer nothing is read.
        real &= arrival < A
        tl.store(inverse + arrival, row, mask=real)
    tl.store(order + row, tl.where(real, arrival, -1))
