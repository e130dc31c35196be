"""Random dispatches and the numpy plan that every other plan must equal.

Shape legend: N ranks, E experts, R residents at most, P padded rows, A arrivals.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.kernels.token_dispatch.borrow import borrow_experts, borrow_experts_reference
from lightning_swiftmoe.kernels.token_dispatch.split import split_exactly
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize, TokenPlan, Turns
from lightning_swiftmoe.parallel.token_dispatcher import send_order
from lightning_swiftmoe.placement import DispatchPlan, Placement, Shares, TokenRule, host_share, plan_dispatch
from lightning_swiftmoe.placement.exact_split import exact_split, turn_table


@dataclass
class Case:
    """A batch on every rank and a placement."""

    topk_idx: list[Tensor]  # for each rank [T, k]
    counts: np.ndarray  # [N, E]
    placement: Placement
    capacity: Capacity | None
    exact: bool = False
    copies: int = 0

    @cached_property
    def _shares(self) -> Shares:
        split = "exact" if self.exact else "even"
        if self.capacity is None:
            return TokenRule("cluster", split, self.copies).share_out(self.counts, self.placement, None)
        rule = TokenRule(self.capacity.scope, split, self.copies)
        return rule.share_out(self.counts, self.placement, self.capacity.factor)

    @property
    def copied(self) -> np.ndarray:
        """`[N, E]` who borrows what."""
        copied = self._shares.copied
        return np.zeros(self.counts.shape, dtype=bool) if copied is None else copied

    @property
    def kept(self) -> np.ndarray:
        return self._shares.kept

    @property
    def share(self) -> np.ndarray:
        return self._shares.hosted

    def plan(self, rank: int) -> DispatchPlan:
        """The host's."""
        return plan_dispatch(self.kept, self.share, rank)

    def turns(self, device: str = "cpu") -> Turns | None:
        """As `plan_tokens` takes them."""
        return turns_on(self.placement, device) if self.exact else None

    def size(self, layout: str, tile: int, slack: int = 0) -> PlanSize:
        """As many rows as the fullest rank needs, and some more."""
        padded = (-(-self.share // tile) * tile).sum(axis=1).max()
        arrivals = int(self.share.sum(axis=1).max()) + slack
        rows = max(int(padded) + slack * tile, tile)
        residents = self.placement.slots_per_rank + self.copies
        return PlanSize(residents, rows, tile, layout, max(arrivals, 1) if layout == "packed" else 0, self.copies)

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Counts, multiplicity and replicas as `plan_tokens` takes them."""
        return (
            torch.tensor(self.counts, device=device),
            torch.tensor(self.placement.multiplicity, dtype=torch.int32, device=device),
            torch.tensor(self.placement.replicas, dtype=torch.int32, device=device),
        )


def random_placement(rng: np.random.Generator, num_ranks: int, slots: int, num_experts: int) -> Placement:
    """Every expert once, the other slots by chance: hosts come in any order and may hold an expert more than once."""
    table = np.concatenate([np.arange(num_experts), rng.integers(num_experts, size=num_ranks * slots - num_experts)])
    return Placement(rng.permutation(table).reshape(num_ranks, slots), num_experts)


def turns_on(placement: Placement, device: str) -> Turns:
    """With room for others: nobody reads beyond the last turn."""
    table = turn_table(placement)
    beyond = np.full((2, 3, placement.num_ranks), -9)
    on_device = torch.tensor(np.concatenate([table, beyond]), dtype=torch.int32, device=device)
    return Turns(on_device, on_device.new_tensor([len(table)]))


def check_same_split(load: np.ndarray, placement: Placement, device: str) -> None:
    """The device's exact split is the host's; without an expert that has a choice there is nothing to do."""
    turns = turns_on(placement, device)
    share = torch.tensor(host_share(load, placement), dtype=torch.int32, device=device)
    found = split_exactly(torch.tensor(load, device=device), share, turns)
    assert found is share
    assert torch.equal(share.cpu().long(), torch.tensor(exact_split(load, placement)))


def check_same_copies(load: np.ndarray, placement: Placement, most: int, device: str) -> int:
    """The device borrows as the host does; how many copies there were."""
    split = torch.tensor(exact_split(load, placement), dtype=torch.int32)
    slots = torch.tensor(placement.multiplicity, dtype=torch.int32)
    want_share = split.clone()
    want = borrow_experts_reference(want_share, slots, most)
    share = split.to(device)
    found = borrow_experts(share, slots.to(device), most)
    assert torch.equal(share.cpu(), want_share)
    for ours, theirs in zip(found, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    return int((want[0] >= 0).sum())


def random_case(seed: int) -> Case:
    """Few ranks and experts, skewed loads, ranks without a token, experts that nobody names, drops on the way in."""
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = int(rng.integers(1, 8)), int(rng.integers(1, 10))
    slots = -(-num_experts // num_ranks) + int(rng.integers(0, 3))
    top_k = int(rng.integers(1, min(2, num_experts) + 1))
    placement = random_placement(rng, num_ranks, slots, num_experts)
    skew = rng.dirichlet(np.full(num_experts, rng.choice([0.2, 1.0, 10.0]))) + 1e-9
    batches, counts = [], np.zeros((num_ranks, num_experts), dtype=np.int64)
    for rank in range(num_ranks):
        tokens = int(rng.integers(0, 40)) * int(rng.random() > 0.15)
        noise = np.log(skew) + rng.gumbel(size=(tokens, num_experts))
        idx = np.argsort(-noise, axis=1)[:, :top_k]
        idx = np.where(rng.random(idx.shape) < 0.05, -1, idx)
        batches.append(torch.from_numpy(idx))
        counts[rank] = np.bincount(idx[idx >= 0], minlength=num_experts)
    scope = [None, "cluster", "rank", "pooled"][seed % 4]
    exact = seed % 8 > 3
    factor = float(rng.choice([0.5, 1.0, 1.1, 1.25, 2.0]))
    capacity = None if scope is None else Capacity(factor, num_ranks * slots, scope)
    return Case(batches, counts, placement, capacity, exact, seed % 3 if exact else 0)


def check_plan(case: Case, rank: int, plan: TokenPlan) -> None:
    """Every field against numpy, and loops."""
    want = case.plan(rank)
    assert plan.kept.tolist() == case.kept[rank].tolist()
    assert plan.send.tolist() == want.send.tolist()
    assert plan.recv.tolist() == want.recv.tolist()
    assert plan.rank_load.tolist() == want.rank_load.tolist()
    assert plan.send_until.tolist() == (np.cumsum(want.send, axis=0) - want.send).tolist()
    assert plan.send_rows.tolist() == want.send.sum(axis=1).tolist()
    assert plan.recv_rows.tolist() == want.recv.sum(axis=1).tolist()
    padded = -(-case.share // plan.size.tile) * plan.size.tile
    assert plan.needed_rows.tolist() == padded.sum(axis=1).tolist()
    check_layout(case, rank, plan)
    check_base(case, rank, plan)


def check_layout(case: Case, rank: int, plan: TokenPlan) -> None:
    """This rank as a host: residents one after the other in whole tiles, inside them sources in rank order."""
    size, residents = plan.size, case.placement.residents(rank).tolist()
    recv = case.plan(rank).recv
    residents += [-1] * (size.max_residents - size.max_copies - len(residents))
    residents += plan.copies[rank].tolist()
    assert plan.residents.tolist() == residents
    assert sorted(plan.copies[rank][plan.copies[rank] >= 0].tolist()) == np.flatnonzero(case.copied[rank]).tolist()
    arrival_start = (np.cumsum(recv.ravel()) - recv.ravel()).reshape(recv.shape)
    starts, ends, order, tile_expert = [0], [], [], []
    for number, expert in enumerate(residents):
        if expert < 0:
            ends.append(starts[-1])
            starts.append(starts[-1])
            continue
        arrivals = []
        for source in range(recv.shape[0]):
            arrivals += range(arrival_start[source, expert], arrival_start[source, expert] + recv[source, expert])
        if size.layout == "padded":
            arrivals = list(range(len(order), len(order) + len(arrivals)))
        ends.append(starts[-1] + len(arrivals))
        order += arrivals + [-1] * (-len(arrivals) % size.tile)
        starts.append(len(order))
        tile_expert += [number] * (len(order) // size.tile - len(tile_expert))
    used = len(order)
    assert plan.starts.tolist() == starts
    assert plan.ends.tolist() == ends
    assert plan.num_rows.tolist() == [used]
    order += [-1] * (size.max_rows - used)
    assert plan.order.tolist() == order
    rest = size.max_rows // size.tile - len(tile_expert)
    assert plan.tile_expert.tolist() == tile_expert + [size.max_residents - 1] * rest
    inverse = [-1] * plan.inverse.shape[0]
    for row, arrival in enumerate(order):
        if arrival >= 0:
            inverse[arrival] = row
    assert plan.inverse.tolist() == inverse
    assert plan.inverse.shape[0] == (size.max_arrivals if size.layout == "packed" else size.max_rows)


def check_base(case: Case, rank: int, plan: TokenPlan) -> None:
    """Where each assignment stands: row by row in send order, or source by source in the host's layout."""
    for expert in range(case.placement.num_experts):
        for host in range(case.placement.num_ranks):
            first = int(plan.send_until[host, expert])
            got = [int(plan.base[host, expert]) + first + at for at in range(int(plan.send[host, expert]))]
            assert got == rows_at(case, rank, plan, host, expert)


def rows_at(case: Case, rank: int, plan: TokenPlan, host: int, expert: int) -> list[int]:
    send = case.plan(rank).send
    if plan.size.layout == "packed":
        start = int(send.ravel()[: host * send.shape[1] + expert].sum())
    else:
        padded = -(-case.share[host] // plan.size.tile) * plan.size.tile
        copies = plan.copies[host].tolist()
        before = [*np.flatnonzero(~case.copied[host]), *(copy for copy in copies if copy >= 0)]
        before = before[: before.index(expert)]
        theirs = case.plan(host).recv
        start = int(padded[before].sum() + theirs[:rank, expert].sum())
    return list(range(start, start + int(send[host, expert])))


def check_send_order(case: Case, rank: int, plan: TokenPlan, rows: Tensor) -> None:
    """`rows[T, k]` of a packed address against the order that the host-side dispatcher sends in."""
    flat = case.topk_idx[rank].flatten()
    if (flat < 0).any():
        return  # that dispatcher knows no drops before it
    send = case.plan(rank).send
    order = send_order(flat, case.counts[rank], send)
    want = torch.full_like(flat, -1)
    want[order] = torch.arange(order.numel())
    assert rows.flatten().tolist() == want.tolist()
