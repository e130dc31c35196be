"""UltraEP and LLEP: plans against hand-worked ones, brute force and linear programs; bytes and room in a replay."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import Placement, uniform
from lightning_swiftmoe.simulate import Hardware, LoadTrace, ModelShape, Scenario, simulate
from lightning_swiftmoe.simulate.systems import BOUND, resolve_system
from lightning_swiftmoe.simulate.traffic import copy_flow, route_pooled
from lightning_swiftmoe.simulate.with_homes import keep_below, llep, lowest_limit, ultraep
from tests.placement.test_exact_split import smallest_largest_rank

A100 = Hardware("A100", 312, 2039, 80, 32, 100, 5, gpus_per_node=1, num_nodes=4)
MODEL = ModelShape(dim=64, ffn_dim=256, num_layers=2, num_moe_layers=1, num_experts=8, top_k=1)
SHAPES = [(1, 4), (2, 4), (4, 8), (8, 8), (16, 32), (5, 15)]
# Four ranks, at home on each: 0 and 1, 2 and 3, 4 and 5, 6 and 7.
FOUR = uniform(ClusterShape(4, 2, 8))


def homes(num_ranks, num_experts):
    return uniform(ClusterShape(num_ranks, num_experts // num_ranks, num_experts))


def loads(num_ranks, num_experts, each=16384):
    """Of much and of little skew, one expert alone, all alike, none at all."""
    rng = np.random.default_rng(num_ranks)
    for skew in (0.1, 0.3, 1.0, 5.0) * 3:
        yield rng.multinomial(each * num_ranks, rng.dirichlet(np.full(num_experts, skew)))
    yield np.bincount([num_experts // 2], minlength=num_experts) * each * num_ranks
    yield np.full(num_experts, each)
    yield np.zeros(num_experts, dtype=np.int64)


def check(load, placement, split):
    at_home = placement.multiplicity > 0
    assert (split.hosted >= 0).all()
    assert (split.hosted.sum(axis=0) == load).all()
    assert not split.hosted[~at_home & ~split.copied].any()
    assert (split.hosted[split.copied] > 0).all()
    assert not (split.copied & at_home).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("tolerance", [0, 0.01])
def test_ultraep_keeps_every_rank_below_the_first_limit_that_can_be(shape, most, tolerance):
    placement = homes(*shape)
    for load in loads(*shape):
        split = ultraep(load, placement, most, tolerance=tolerance)
        check(load, placement, split)
        assert (split.copied.sum(axis=1) <= most).all()
        assert (split.hosted[placement.multiplicity > 0][load > 0] > 0).all()  # a home keeps one at least
        mean, largest = -(-int(load.sum()) // shape[0]), int((placement.multiplicity @ load).max())
        first, step = int(np.ceil(mean * (1 + tolerance))), -(-largest // 100)
        tried = [first, min(first + step, largest), min(first + 2 * step, largest)]
        kept = [limit for limit in tried if keep_below(limit, load, placement, most) is not None]
        limit = kept[0] if kept else lowest_limit(load, placement, most, 1024)
        assert split.hosted.sum(axis=1).max() <= limit
        if not kept:
            assert (split.hosted[split.copied] >= 1024).all()


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_no_limit_below_ultraeps_can_be_kept(seed, most):
    """Copies of any size, and every limit from the mean on is tried."""
    rng = np.random.default_rng(seed)
    load = rng.multinomial(400, rng.dirichlet(np.full(8, 0.4)))
    found = lowest_limit(load, FOUR, most, least=1)
    split = keep_below(found, load, FOUR, most, least=1)
    check(load, FOUR, split)
    assert split.hosted.sum(axis=1).max() <= found
    assert all(keep_below(limit, load, FOUR, most, least=1) is None for limit in range(100, found))


@pytest.mark.parametrize("seed", range(8))
def test_ultraep_beside_every_choice_of_copies(seed):
    """Four ranks, four experts, one copy each, by linear programs: nothing is below the best, the worst 16 % above."""
    rng = np.random.default_rng(seed)
    load = rng.multinomial(30000, rng.dirichlet(np.full(4, 0.7)))
    best = min(
        smallest_largest_rank(load, Placement(np.column_stack([homes(4, 4).table, copies]), 4))
        for copies in product(range(4), repeat=4)
    )
    found = lowest_limit(load, homes(4, 4), most=1, least=1)
    assert best - 1e-6 <= found <= 1.16 * best


@pytest.mark.parametrize("shape", SHAPES)
def test_with_slots_for_all_ultraep_reaches_the_mean(shape):
    for load in loads(*shape):
        mean = -(-int(load.sum()) // shape[0])
        assert lowest_limit(load, homes(*shape), shape[1], least=1) == mean


def test_ultraep_by_hand():
    """Ranks have 70, 50, 15 and 25, so that two have 30 and 10 above the mean."""
    load = np.array([50, 20, 30, 20, 10, 5, 15, 10])
    # One slot each: rank 2 must take all that rank 0 has too much, 70 - L of its L - 15; then rank 1 lends to rank 3.
    assert lowest_limit(load, FOUR, most=1, least=1) == 43
    split = keep_below(43, load, FOUR, most=1)
    assert split.hosted.tolist() == [
        [23, 20, 0, 0, 0, 0, 0, 0],
        [0, 0, 23, 20, 0, 0, 0, 0],
        [27, 0, 0, 0, 10, 5, 0, 0],
        [0, 0, 7, 0, 0, 0, 15, 10],
    ]
    # 1 % above the mean is 41; a hundredth of the largest, 1, more is 42, and again 43.
    assert (ultraep(load, FOUR, 1).hosted == split.hosted).all()
    assert ultraep(load, FOUR, 2, tolerance=0).hosted.sum(axis=1).tolist() == [40, 40, 40, 40]
    # Rank 0 has to lend 26 to rank 2 and 3 to rank 3.
    assert keep_below(41, load, FOUR, most=2, least=3) is not None
    assert keep_below(41, load, FOUR, most=2, least=4) is None


def test_llep_by_hand():
    """The mean is 4000; ranks have 7800, 3500, 3500 and 1200."""
    load = np.array([7000, 800, 3000, 500, 3000, 500, 1000, 200])
    split = llep(load, FOUR)
    # Expert 0 keeps what expert 1 leaves, 3200; rank 3 takes 2800. Of the last 1000 neither rank 1 nor 2 has room for
    # more than 500, which is no copy's worth: rank 1 takes all. Then expert 2 has 500 too much there, for rank 2.
    assert split.hosted.tolist() == [
        [3200, 800, 0, 0, 0, 0, 0, 0],
        [1000, 0, 2500, 500, 0, 0, 0, 0],
        [0, 0, 500, 0, 3000, 500, 0, 0],
        [2800, 0, 0, 0, 0, 0, 1000, 200],
    ]
    assert split.copied.nonzero()[0].tolist() == [1, 2, 3]


def test_llep_sends_away_all_of_an_expert_where_the_others_fill_its_home():
    """Ranks have 9500, 3000, 2500 and 1000: expert 1 alone is above the mean of 4000."""
    split = llep(np.array([5000, 4500, 2000, 1000, 1500, 1000, 600, 400]), FOUR)
    assert split.hosted[:, 0].tolist() == [0, 500, 1500, 3000]
    assert split.hosted[:, 1].tolist() == [4000, 500, 0, 0]
    assert split.hosted.sum(axis=1).tolist() == [4000, 4000, 4000, 4000]


def test_llep_leaves_ranks_alone_below_its_threshold():
    load = np.array([2000, 3199, 1800, 2000, 1500, 2000, 1500, 2001])  # the first rank is 5199 of a mean of 4000
    assert llep(load, FOUR).hosted.sum(axis=1).tolist() == [5199, 3800, 3500, 3501]
    assert not llep(load, FOUR).copied.any()
    assert llep(load + np.array([1, 0, 0, 0, 0, 0, 0, -1]), FOUR).copied.any()  # 5200: it is reached


@pytest.mark.parametrize("shape", SHAPES)
def test_llep_whatever_comes(shape):
    placement = homes(*shape)
    for load in loads(*shape):
        split = llep(load, placement)
        check(load, placement, split)
        rank_load, mean = placement.multiplicity @ load, load.sum() / shape[0]
        assert split.copied.any() == (rank_load.max() >= 1.3 * mean > 0)
        # Forced copies alone put a rank above the mean, each by less than the smallest copy.
        assert split.hosted.sum(axis=1).max() <= max(1.3 * mean, mean + 1024 * split.copied.sum(axis=1).max())


@pytest.mark.parametrize("name", ["ultraep", "llep"])
def test_copies_travel_from_the_home_and_their_gradients_back(name):
    system, rng = resolve_system(name, 0), np.random.default_rng(1)
    counts = rng.multinomial(8000, rng.dirichlet(np.full(8, 0.3)), size=4)
    split = system.split(counts.sum(axis=0), FOUR)
    assert split.copied.any()
    flow = copy_flow(route_pooled(counts, FOUR, 0, system.split).copies, MODEL, system.fetches)
    weights, gradients = np.zeros((4, 4)), np.zeros((4, 4))  # [from, to]
    for rank, expert in zip(*split.copied.nonzero(), strict=True):
        weights[expert // 2, rank] += MODEL.weight_expert_bytes
        gradients[rank, expert // 2] += MODEL.grad_expert_bytes
    assert flow.weights.sent_bytes == pytest.approx(weights.sum(axis=1))
    assert flow.weights.received_bytes == pytest.approx(weights.sum(axis=0))
    assert flow.gradients.sent_bytes == pytest.approx(gradients.sum(axis=1))
    assert flow.gradients.received_bytes == pytest.approx(gradients.sum(axis=0))


def a_trace(num_steps=3):
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.full(8, 0.3), size=num_steps)
    counts = np.stack([rng.multinomial(8000, share, size=4) for share in shares])[:, None]
    return LoadTrace(counts, np.arange(num_steps), 1)


@pytest.mark.parametrize(("name", "fetches"), [("ultraep", 2), ("llep", 1)])
@pytest.mark.parametrize("published", [True, False])
def test_a_replay_by_hand(name, fetches, published):
    """Kept is what fits into a rank; bytes are copies' alone, for state never leaves home."""
    trace, system = a_trace(), resolve_system(name, 0)
    scenario = Scenario(MODEL, A100, 3, 1.0, published_baselines=published)
    result = simulate(trace, scenario, [name]).results[name]
    for step, counts in enumerate(trace.counts[:, 0]):
        split = system.split(counts.sum(axis=0).astype(np.int64), FOUR)
        # 32,000 assignments over 12 slots of 2,667, three of which pool their room, although two experts live there.
        kept = np.minimum(split.hosted.sum(axis=1), 3 * 2667).sum()
        assert result.survival[step] == pytest.approx(kept / 32000)
        moved = split.copied.sum() * (fetches * MODEL.weight_expert_bytes + MODEL.grad_expert_bytes)
        assert result.phase_bytes["transient_copies"][step] == pytest.approx(moved)
    for phase in ("gradient", "weight", "migration"):
        assert not result.phase_bytes[phase].any()
    assert not result.phase_s["placement"].any()
    direct = simulate(trace, scenario, ["exact"]).results["exact"]
    assert result.phase_s["optimizer"] == pytest.approx(direct.phase_s["optimizer"])
    assert (result.replicas == 1).all()


@pytest.mark.parametrize("name", ["ultraep", "llep"])
def test_slots_that_replicas_would_fill_change_nothing(name):
    """8 and 16 slots of 32,000 assignments give a rank the same room, and dropless all is kept."""
    few, many = (simulate(a_trace(), Scenario(MODEL, A100, slots), [name]).results[name] for slots in (2, 4))
    assert few.survival.tolist() == many.survival.tolist()
    assert few.step_s.tolist() == many.step_s.tolist()
    assert simulate(a_trace(), Scenario(MODEL, A100, 2, None), [name]).results[name].mean_survival == 1


@pytest.mark.parametrize("name", ["ultraep", "llep"])
def test_homes_that_do_not_fit_are_refused(name):
    counts = np.ones((1, 1, 4, 6), dtype=np.int64)
    scenario = Scenario(replace(MODEL, num_experts=6), A100, 2)
    with pytest.raises(
        ValueError, match=f"{name} needs as many experts at home .* got 6 experts on 4 ranks: .* of 4 exp"
    ):
        simulate(LoadTrace(counts, np.arange(1), 1), scenario, ["static", name])
    with pytest.raises(ValueError, match=f"{name} binds it to the hosts"):
        simulate(a_trace(), Scenario(MODEL, A100, 4, expert_parallel_size=2), [name])
    assert resolve_system(name, 0).state == BOUND
