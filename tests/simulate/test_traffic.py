"""Bytes: closed formulas, hand-worked placements, and brute force over every sender and receiver."""

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import (
    Placement,
    RandomPolicy,
    host_share,
    keep_within_capacity,
    plan_dispatch,
    uniform,
)
from lightning_swiftmoe.placement.exact_split import exact_split, keep_within_ranks
from lightning_swiftmoe.placement.residency import Residency
from lightning_swiftmoe.placement.transient_copies import with_copies
from lightning_swiftmoe.simulate import ModelShape
from lightning_swiftmoe.simulate.systems import BOUND, DIRECT, PUBLISHED, ExactSplit
from lightning_swiftmoe.simulate.traffic import (
    copy_flow,
    gradient_flow,
    migration_flow,
    owned_params,
    route,
    route_pooled,
    weight_flow,
)

MODEL = ModelShape(dim=10, ffn_dim=30, num_layers=1, num_moe_layers=1, num_experts=5)  # P = 600, G = W = 1200 B
SHAPES = [(1, 5), (2, 3), (3, 2), (4, 4), (5, 2)]


def placements(num_ranks, slots):
    cluster = ClusterShape(num_ranks, slots, 5)
    for seed in range(4):
        yield RandomPolicy(seed)(np.arange(5), cluster, uniform(cluster))


@pytest.mark.parametrize("shape", SHAPES)
def test_residency_is_the_dense_table_without_its_zeros(shape):
    for placement in placements(*shape):
        residency, load = Residency.of(placement), np.array([17, 0, 5, 101, 3])
        dense = np.zeros_like(placement.multiplicity)
        dense[residency.rank, residency.expert] = residency.multiplicity
        assert (dense == placement.multiplicity).all()
        assert (residency.num_residents == placement.num_residents).all()
        share = np.zeros_like(dense)
        share[residency.rank, residency.expert] = residency.share(load)
        assert (share == host_share(load, placement)).all()
        for e in range(5):
            assert residency.rank[residency.expert == e].tolist() == placement.hosts(e).tolist()
            assert residency.host_index[residency.expert == e].tolist() == list(range(placement.hosts(e).size))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("capacity", [0, 7])
def test_dispatch_counts_equal_the_plan_that_training_runs(shape, capacity):
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 20, (shape[0], 5))
    for placement in placements(*shape):
        routed = route(counts, Residency.of(placement), capacity)
        limit = capacity * placement.replicas if capacity else counts.sum(0)
        kept = keep_within_capacity(counts, limit)
        plans = [plan_dispatch(kept, host_share(kept.sum(0), placement), rank) for rank in range(shape[0])]
        assert routed.kept.tolist() == kept.sum(0).tolist()
        assert routed.rank_load.tolist() == plans[0].rank_load.tolist()
        assert routed.sent.tolist() == [p.send.sum() - p.send[r].sum() for r, p in enumerate(plans)]
        assert routed.received.tolist() == [p.recv.sum() - p.recv[r].sum() for r, p in enumerate(plans)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("capacity", [0, 7])
def test_an_exact_split_fills_ranks_and_not_slots(shape, capacity):
    num_ranks, slots = shape
    counts = np.random.default_rng(1).integers(0, 20, (num_ranks, 5))
    for placement in placements(*shape):
        routed = route_pooled(counts, placement, capacity * slots, ExactSplit())
        split = exact_split(counts.sum(0), placement)
        processed = keep_within_ranks(split, capacity * slots) if capacity else split
        by_source = keep_within_capacity(counts, processed.sum(0))
        assert routed.offered_load.tolist() == split.sum(1).tolist()
        assert routed.rank_load.tolist() == processed.sum(1).tolist()
        assert routed.kept.tolist() == processed.sum(0).tolist()
        at_home = np.minimum(by_source, processed).sum(1)
        assert routed.sent.tolist() == (by_source.sum(1) - at_home).tolist()
        assert routed.received.tolist() == (processed.sum(1) - at_home).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_transient_copies_by_brute_force(shape):
    num_ranks = shape[0]
    counts = np.random.default_rng(1).integers(0, 20, (num_ranks, 5)) ** 2
    borrowed = 0
    for placement in placements(*shape):
        routed = route_pooled(counts, placement, 0, ExactSplit(copies=2))
        found = with_copies(exact_split(counts.sum(0), placement), placement, 2)
        assert routed.rank_load.tolist() == found.hosted.sum(1).tolist()
        assert routed.kept.tolist() == counts.sum(0).tolist()
        lent, borrowed_here = np.zeros(num_ranks), np.zeros(num_ranks)
        for expert in range(5):
            for number, rank in enumerate(np.flatnonzero(found.copied[:, expert])):
                hosts = placement.hosts(expert)
                lent[hosts[number % hosts.size]] += 1
                borrowed_here[rank] += 1
        flow = copy_flow(routed.copies, MODEL, fetches=2)
        assert flow.weights.sent_bytes == pytest.approx(lent * MODEL.weight_expert_bytes)
        assert flow.weights.received_bytes == pytest.approx(borrowed_here * MODEL.weight_expert_bytes)
        assert flow.gradients.sent_bytes == pytest.approx(borrowed_here * MODEL.grad_expert_bytes)
        assert flow.gradients.received_bytes == pytest.approx(lent * MODEL.grad_expert_bytes)
        assert flow.total_bytes == pytest.approx(3 * 1200 * found.copied.sum())
        borrowed += found.copied.sum()
    assert borrowed or num_ranks == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_direct_exchange_by_brute_force(shape):
    n = shape[0]
    for placement in placements(*shape):
        sent, received = np.zeros(n), np.zeros(n)
        for rank in range(n):
            for _ in placement.residents(rank):
                for owner in range(n):
                    if owner != rank:
                        sent[rank] += 1200 / n
                        received[owner] += 1200 / n
        flow = gradient_flow(Residency.of(placement), MODEL, DIRECT, all_reduce=False)
        assert flow.sent_bytes == pytest.approx(sent)
        assert flow.received_bytes == pytest.approx(received)
        back = weight_flow(Residency.of(placement), MODEL, DIRECT)
        assert back.sent_bytes == pytest.approx(received)
        assert back.received_bytes == pytest.approx(sent)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_exchange_by_brute_force(shape):
    n = shape[0]
    for placement in placements(*shape):
        sent, received = np.zeros(n), np.zeros(n)
        for e in range(5):
            hosts = placement.hosts(e).tolist()
            for host in hosts:
                sent[host] += 2 * (len(hosts) - 1) / len(hosts) * 1200
                received[host] += 2 * (len(hosts) - 1) / len(hosts) * 1200
            for rank in range(n):
                if rank not in hosts:
                    sent[hosts[rank % len(hosts)]] += 1200 / n
                    received[rank] += 1200 / n
        flow = gradient_flow(Residency.of(placement), MODEL, PUBLISHED, all_reduce=False)
        assert flow.sent_bytes == pytest.approx(sent)
        assert flow.received_bytes == pytest.approx(received)
        assert weight_flow(Residency.of(placement), MODEL, PUBLISHED).total_bytes == pytest.approx(
            placement.table.size * 1200 * (n - 1) / n
        )


def test_static_equals_the_published_volume():
    # r = sN/E = 2 hosts each: (sN - E)/N * X per rank (SwiftMoE, section 4).
    model = ModelShape(dim=10, ffn_dim=30, num_layers=1, num_moe_layers=1, num_experts=4)
    residency = Residency.of(uniform(ClusterShape(4, 2, 4)))
    flow = gradient_flow(residency, model, BOUND, all_reduce=False)
    assert flow.sent_bytes == pytest.approx([(8 - 4) / 4 * 1200] * 4)
    assert gradient_flow(residency, model, BOUND, all_reduce=True).total_bytes == 2 * flow.total_bytes
    assert owned_params(residency, model, BOUND).tolist() == owned_params(residency, model, DIRECT).tolist()


def test_direct_sends_no_more_than_the_published_formula():
    for shape in SHAPES:
        for placement in placements(*shape):
            residency = Residency.of(placement)
            formula = (placement.table.size - shape[1]) / shape[0] * 1200
            direct = gradient_flow(residency, MODEL, DIRECT, all_reduce=False)
            assert direct.sent_bytes.max() <= formula + 1e-9


def test_migration_by_hand():
    # Expert 1 (600 elements, state 16 B, weights 2 B) gains rank 1: owners {1: all} becomes 300 + 300 on ranks 0, 1.
    model = ModelShape(dim=10, ffn_dim=30, num_layers=1, num_moe_layers=1, num_experts=2)
    before = Placement(np.array([[0, 0], [0, 1]]), 2)
    after = Placement(np.array([[0, 1], [0, 1]]), 2)
    moved = migration_flow(before, after, model, whole=False)
    assert moved.state.sent_bytes.tolist() == [0, 300 * 16]
    assert moved.state.received_bytes.tolist() == [300 * 16, 0]
    assert moved.weights.sent_bytes.tolist() == [0, 1200]
    whole = migration_flow(before, after, model, whole=True)
    assert whole.state.total_bytes == 600 * 16
