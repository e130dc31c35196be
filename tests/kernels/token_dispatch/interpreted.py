"""Checks of the token dispatch kernels in the interpreter. Run as a module in its own process: the switch is read on
import."""

import sys
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.kernels.token_dispatch.address import address_tokens, address_tokens_reference
from lightning_swiftmoe.kernels.token_dispatch.barrier import Signals, barrier, exchange_counts, pad_size
from lightning_swiftmoe.kernels.token_dispatch.move import peer_addresses
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.plan_reference import plan_tokens_reference
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize, TokenPlan
from tests.kernels.token_dispatch.cases import (
    Case,
    check_plan,
    check_same_copies,
    check_same_split,
    check_send_order,
    random_case,
    random_placement,
)
from tests.kernels.token_dispatch.end_to_end import Cluster, check_packed, check_padded

CPU = torch.device("cpu")


def check_same(got: TokenPlan, want: TokenPlan) -> None:
    """Every tensor, and its dtype."""
    for field in fields(TokenPlan):
        ours, theirs = getattr(got, field.name), getattr(want, field.name)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name


def check_plans(seed: int) -> None:
    case = random_case(seed)
    for layout in ("padded", "packed"):
        size = case.size(layout, tile=4, slack=seed % 2)
        for rank in {0, seed % case.placement.num_ranks, case.placement.num_ranks - 1}:
            plan = plan_tokens(*case.tensors(), rank, size, case.capacity, case.turns())
            check_same(plan, plan_tokens_reference(*case.tensors(), rank, size, case.capacity, case.turns()))
            check_plan(case, rank, plan)
            address = address_tokens(case.topk_idx[rank], plan)
            want = address_tokens_reference(case.topk_idx[rank], plan)
            assert torch.equal(address.host, want.host)
            assert torch.equal(address.row, want.row)
            if layout == "packed":
                check_send_order(case, rank, plan, address.row)


def check_many_ranks(capacity: Capacity | None, exact: bool = False) -> None:
    """More ranks than the scan takes in several steps."""
    rng = np.random.default_rng(0)
    num_ranks, num_experts = 19, 33
    counts = rng.poisson(3, size=(num_ranks, num_experts))
    case = Case([], counts, random_placement(rng, num_ranks, 3, num_experts), capacity, exact)
    size = case.size("packed", tile=16)
    for rank in (0, 18):
        plan = plan_tokens(*case.tensors(), rank, size, capacity, case.turns())
        check_same(plan, plan_tokens_reference(*case.tensors(), rank, size, capacity, case.turns()))
        check_plan(case, rank, plan)


def check_too_few_rows() -> None:
    """More rows than there is room for: nothing points beyond it, and the plan says what it would take."""
    case = random_case(6)
    whole = case.size("padded", tile=4)
    assert whole.max_rows > 4
    for size in (PlanSize(whole.max_residents, 4, 4), PlanSize(whole.max_residents, 4, 4, "packed", 3)):
        for rank in range(case.placement.num_ranks):
            plan = plan_tokens(*case.tensors(), rank, size, case.capacity, case.turns())
            check_same(plan, plan_tokens_reference(*case.tensors(), rank, size, case.capacity, case.turns()))
            assert plan.needed_rows.max() == whole.max_rows
            assert plan.starts.max() <= 4
            assert plan.ends.max() <= 4
            assert plan.inverse.max() < 4
            address = address_tokens(case.topk_idx[rank], plan)
            want = address_tokens_reference(case.topk_idx[rank], plan)
            assert torch.equal(address.row, want.row)
            if size.layout == "padded":
                assert (address.row < 4).all()


def check_end_to_end(seed: int) -> None:
    case = random_case(seed)
    width = [16, 9, 2100][seed % 3]
    check_padded(Cluster(case, case.size("padded", tile=4, slack=1), width))
    check_packed(Cluster(case, case.size("packed", tile=4, slack=1), width))


def check_barrier() -> None:
    """Each rank in turn, its peers already there: it signals all, and only its own place on its own channel."""
    num_ranks, num_channels, experts = 3, 2, 5
    pads = [torch.zeros(pad_size(num_ranks, num_channels), dtype=torch.int32) for _ in range(num_ranks)]
    tables = [torch.full((num_ranks, experts), -1) for _ in range(num_ranks)]
    peer_counts = peer_addresses([t.data_ptr() for t in tables], CPU)
    for rank in range(num_ranks):
        signals = Signals.of([p.data_ptr() for p in pads], rank, num_channels, CPU)
        for pad in pads:
            pad.zero_()
        pads[rank].fill_(2)
        barrier(signals, channel=1)
        exchange_counts(torch.arange(experts, dtype=torch.int32) + rank, peer_counts, signals, channel=1)
        barrier(signals, channel=0)
        assert signals.epochs.tolist() == [1, 2]
        for peer, pad in enumerate(pads):
            want = torch.full((num_channels, num_ranks), 2 if peer == rank else 0)
            want[:, rank] = torch.tensor([1, 2])
            assert pad.tolist() == want.flatten().tolist()
    want = torch.arange(experts) + torch.arange(num_ranks)[:, None]
    assert all(torch.equal(table, want) for table in tables)


def check_split(seed: int) -> None:
    """Loads the placement was made for and others, at most one expert, none."""
    case = random_case(seed)
    placement = case.placement
    for load in (case.counts.sum(axis=0), case.counts[0], np.bincount([0], minlength=placement.num_experts) * 999):
        check_same_split(load, placement, "cpu")


def check_copies() -> None:
    """Few and many ranks, several copies, loads that need none and loads that need many."""
    copies = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        num_ranks = [1, 2, 3, 5, 11, 16][seed % 6]
        num_experts = int(rng.integers(num_ranks, 3 * num_ranks + 2))
        slots = -(-num_experts // num_ranks) + int(rng.integers(2))
        placement = random_placement(rng, num_ranks, slots, num_experts)
        for skew in (0.2, 1.0):
            load = rng.multinomial(997 * num_ranks, rng.dirichlet(np.full(num_experts, 1 / skew)))
            copies += check_same_copies(load, placement, 1 + seed % 3, "cpu")
        check_same_copies(np.zeros(num_experts, dtype=np.int64), placement, 1, "cpu")
        check_same_copies(np.eye(num_experts, dtype=np.int64)[0] * 999, placement, 2, "cpu")
    assert copies > 50


CHECKS = {
    "copies": check_copies,
    "split": lambda: [check_split(seed) for seed in range(12)],
    "plan": lambda: [check_plans(seed) for seed in range(8)],
    "many_ranks": lambda: (
        [check_many_ranks(c) for c in (None, Capacity(1.1, 57), Capacity(1.0, 57, "rank"))]
        + [check_many_ranks(Capacity(1.0, 57, "pooled"), exact) for exact in (False, True)]
    ),
    "too_few_rows": check_too_few_rows,
    "end_to_end": lambda: [check_end_to_end(seed) for seed in (2, 3, 4)],
    "barrier": check_barrier,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        print(name, flush=True)
        CHECKS[name]()
