"""Token dispatch on one GPU: large plans, rows between buffers of one device, barriers between streams."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.kernels.token_dispatch import move
from lightning_swiftmoe.kernels.token_dispatch.address import Address, address_tokens, address_tokens_reference
from lightning_swiftmoe.kernels.token_dispatch.barrier import Signals, barrier, exchange_counts, pad_size
from lightning_swiftmoe.kernels.token_dispatch.move_reference import pull_rows_reference, push_rows_reference
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.plan_reference import plan_tokens_reference
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize, TokenPlan, Turns
from lightning_swiftmoe.placement import RandomPolicy, get_policy, uniform
from tests.kernels.token_dispatch.cases import (
    Case,
    check_plan,
    check_same_copies,
    check_same_split,
    random_case,
    random_placement,
)
from tests.kernels.token_dispatch.end_to_end import Cluster, check_packed, check_padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")


def check_same(got: TokenPlan, want: TokenPlan) -> None:
    for field in fields(TokenPlan):
        ours, theirs = getattr(got, field.name), getattr(want, field.name)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name


@pytest.mark.parametrize("seed", range(24))
def test_plan_is_the_hosts(seed: int) -> None:
    case = random_case(seed)
    for layout in ("padded", "packed"):
        for rank in range(case.placement.num_ranks):
            size = case.size(layout, 128, seed % 2)
            plan = plan_tokens(*case.tensors("cuda"), rank, size, case.capacity, case.turns("cuda"))
            check_plan(case, rank, plan)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scope", [None, "cluster", "rank", "pooled"])
@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "slots"), [(2048, 256, 2), (72, 256, 8), (8, 128, 32), (2, 16, 8)]
)
def test_large_plans(num_ranks: int, num_experts: int, slots: int, scope: str | None, exact: bool, layout: str) -> None:
    rng = np.random.default_rng(0)
    skew = 8192 * num_experts * rng.dirichlet(np.full(num_experts, 0.3)) / num_experts
    counts = rng.poisson(skew, size=(num_ranks, num_experts))
    capacity = None if scope is None else Capacity(1.1, num_ranks * slots, scope)
    case = Case([], counts, random_placement(rng, num_ranks, slots, num_experts), capacity, exact)
    size = case.size(layout, tile=128)
    for rank in {0, num_ranks // 3, num_ranks - 1}:
        torch.cuda.set_sync_debug_mode("error")
        try:
            tensors, turns = case_tensors(case)
            plan = plan_tokens(*tensors, rank, size, capacity, turns)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check_same(plan, plan_tokens_reference(*tensors, rank, size, capacity, turns))


@pytest.mark.parametrize("seed", range(24))
def test_small_splits(seed: int) -> None:
    case = random_case(seed)
    for load in (case.counts.sum(axis=0), case.counts[0]):
        check_same_split(load, case.placement, "cuda")


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize(("num_ranks", "slots", "num_experts"), [(2, 8, 16), (16, 2, 32), (64, 4, 256), (300, 2, 512)])
def test_copies(num_ranks: int, slots: int, num_experts: int, most: int) -> None:
    rng = np.random.default_rng(num_ranks)
    placement = random_placement(rng, num_ranks, slots, num_experts)
    copies = 0
    for alpha in (0.5, 1.0, 5.0):
        load = rng.multinomial(4096 * num_ranks, rng.dirichlet(np.full(num_experts, alpha)))
        copies += check_same_copies(load, placement, most, "cuda")
    assert copies > 0 or num_ranks == 2


@pytest.mark.parametrize("policy", ["balanced", "proportional", "random"])
@pytest.mark.parametrize(("num_ranks", "slots", "num_experts"), [(2, 8, 16), (16, 3, 32), (64, 8, 256), (300, 2, 512)])
def test_large_splits(num_ranks: int, slots: int, num_experts: int, policy: str) -> None:
    """Of a step's drift, of another load altogether, and of one expert alone."""
    rng = np.random.default_rng(0)
    cluster = ClusterShape(num_ranks, slots, num_experts, False)
    zipf = 1 / np.arange(1, num_experts + 1)
    load = rng.multinomial(10_000 * num_ranks, rng.permutation(zipf) / zipf.sum())
    choose = RandomPolicy(1) if policy == "random" else get_policy(policy)
    placement = choose(load, cluster, uniform(cluster))
    drifted = rng.poisson(load * rng.uniform(0.8, 1.25, num_experts))
    alone = np.bincount([num_experts // 2], minlength=num_experts) * 2**29
    for asked in (load, drifted, load[::-1].copy(), alone):
        check_same_split(asked, placement, "cuda")


def case_tensors(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], Turns | None]:
    """Copied with the alarm for synchronisations off."""
    torch.cuda.set_sync_debug_mode("default")
    tensors, turns = case.tensors("cuda"), case.turns("cuda")
    torch.cuda.set_sync_debug_mode("error")
    return tensors, turns


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5000, 8), (70_000, 2)])
def test_addresses(tokens: int, top_k: int) -> None:
    num_ranks, num_experts = 32, 64
    topk_idx = torch.rand(tokens, num_experts, device=CUDA).topk(top_k, dim=-1).indices
    topk_idx[::7, 0] = -1
    rng = np.random.default_rng(1)
    counts = rng.poisson(tokens * top_k / num_experts, size=(num_ranks, num_experts))
    counts[3] = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).cpu().numpy()
    case = Case([], counts, random_placement(rng, num_ranks, 4, num_experts), Capacity(1.0, 128))
    for layout in ("padded", "packed"):
        plan = plan_tokens(*case.tensors("cuda"), 3, case.size(layout, 128), case.capacity)
        got, want = address_tokens(topk_idx, plan), address_tokens_reference(topk_idx, plan)
        assert torch.equal(got.host, want.host)
        assert torch.equal(got.row, want.row)
        assert int((got.row >= 0).sum()) == int(case.kept[3].sum())


@pytest.mark.parametrize("seed", range(12))
def test_end_to_end(seed: int) -> None:
    case = random_case(seed)
    width = [16, 9, 2100, 7168][seed % 4]
    check_padded(Cluster(case, case.size("padded", 16, slack=1), width, "cuda"))
    check_packed(Cluster(case, case.size("packed", 16, slack=1), width, "cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "width", "top_k"), [(3000, 2048, 8), (999, 768, 1), (777, 100, 3)])
def test_rows_between_buffers(tokens: int, width: int, top_k: int, dtype: torch.dtype) -> None:
    num_ranks, rows = 4, tokens * top_k
    place = torch.randperm(num_ranks * rows, device=CUDA)[: tokens * top_k].view(tokens, top_k)
    host, row = place // rows, place % rows
    host[::5, 0], row[::5, 0] = -1, -1
    address = Address(host.int(), row.int())
    source = torch.randn(tokens, width, device=CUDA).to(dtype)
    weights = torch.rand(tokens, top_k, device=CUDA)
    ours = [torch.zeros(rows, width, dtype=dtype, device=CUDA) for _ in range(num_ranks)]
    theirs = [torch.zeros_like(part) for part in ours]
    peers = move.peer_addresses([part.data_ptr() for part in ours], CUDA)
    move.push_rows(source, address, peers)
    push_rows_reference(source, address, theirs)
    assert all(torch.equal(*parts) for parts in zip(ours, theirs, strict=True))
    got, want = torch.empty_like(source), torch.empty_like(source)
    move.pull_rows(address, peers, weights, got)
    pull_rows_reference(address, theirs, weights, want)
    torch.testing.assert_close(got, want)


def test_no_count_compiles_anew() -> None:
    from lightning_swiftmoe.kernels.token_dispatch import address_launch, move_launch, plan_launch

    launchers = [
        value
        for module in (address_launch, move_launch, plan_launch)
        for name, value in vars(module).items()
        if hasattr(value, "_compiled")
    ]
    case = random_case(5)
    size = PlanSize(case.placement.slots_per_rank, 4096, 16)
    compiled = None
    for tokens in (33, 1, 16, 4096, 5000):
        plan = plan_tokens(*case.tensors("cuda"), 0, size, None)
        topk_idx = torch.zeros(tokens, 1, dtype=torch.int64, device=CUDA)
        source = torch.randn(tokens, 64, device=CUDA)
        move.pack_rows(source, address_tokens(topk_idx, plan), 8192)
        now = [len(launcher._compiled) for launcher in launchers]
        assert compiled in (None, now)
        compiled = now


def test_barriers_between_streams() -> None:
    """Ranks are streams of one device: each adds to what it saw of its neighbour, many times over."""
    num_ranks, rounds, experts = 3, 50, 40
    pads = [torch.zeros(pad_size(num_ranks, 2), dtype=torch.int32, device=CUDA) for _ in range(num_ranks)]
    tables = torch.zeros(num_ranks, 2, num_ranks, experts, dtype=torch.int64, device=CUDA)
    peers = [move.peer_addresses([t[parity].data_ptr() for t in tables], CUDA) for parity in range(2)]
    signals = [Signals.of([p.data_ptr() for p in pads], rank, 2, CUDA) for rank in range(num_ranks)]
    counts = [torch.full((experts,), rank, dtype=torch.int64, device=CUDA) for rank in range(num_ranks)]
    # Everything is compiled and loaded before anybody waits: loading may wait for those that spin.
    scratch = [torch.full((pad_size(num_ranks, 2),), 2**30, dtype=torch.int32, device=CUDA) for _ in range(num_ranks)]
    warm = Signals.of([p.data_ptr() for p in scratch], 0, 2, CUDA)
    exchange_counts(counts[0], peers[0], warm)
    barrier(warm, channel=1)
    torch.add(tables[0, 0, 0], 1, out=counts[0].clone())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(num_ranks)]
    for number in range(rounds):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                exchange_counts(counts[rank], peers[number % 2], signals[rank])
                torch.add(tables[rank, number % 2, (rank + 1) % num_ranks], 1, out=counts[rank])
                barrier(signals[rank], channel=1)
    torch.cuda.synchronize()
    for rank in range(num_ranks):
        assert counts[rank].tolist() == [(rank + rounds) % num_ranks + rounds] * experts
        assert signals[rank].epochs.tolist() == [rounds, rounds]
