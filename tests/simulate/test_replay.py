"""Survival and imbalance against an independent computation with plain integers, and the timing of decisions."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import get_policy, uniform
from lightning_swiftmoe.simulate import (
    Hardware,
    LoadTrace,
    ModelShape,
    Scenario,
    System,
    Workload,
    generate,
    read_simulation,
    simulate,
    surviving_replicas,
)

A100 = Hardware("A100", 312, 2039, 80, 32, 100, 5, gpus_per_node=1, num_nodes=4)
MODEL = ModelShape(dim=64, ffn_dim=256, num_layers=2, num_moe_layers=2, num_experts=6, top_k=2)


def a_trace(num_ranks=4, seed=0, num_steps=12):
    work = Workload(num_steps, 2, 6, tokens=480, top_k=2, num_ranks=num_ranks, seed=seed, skew=1.0, pace=5.0)
    return generate("drift", work)


def by_hand(trace, policy, every, factor, slots_per_rank, num_ranks, current=False):
    """Kept and routed assignments, and max/mean rank load before drops, from tables and Python integers alone."""
    cluster = ClusterShape(num_ranks, slots_per_rank, trace.num_experts, factor is not None)
    kept = routed = 0
    imbalances = []
    for layer in range(trace.num_layers):
        placement, since = uniform(cluster), np.zeros(trace.num_experts, dtype=np.int64)
        for step in range(trace.num_steps):
            loads = [int(sum(trace.counts[step, layer, :, e])) for e in range(trace.num_experts)]
            if current:
                placement = policy(np.array(loads), cluster, placement)
            slots = placement.table.ravel().tolist()
            for e, load in enumerate(loads):
                replicas = slots.count(e)
                if factor is None:
                    kept += load
                else:
                    # ceil of an exact fraction: factor is a decimal number such as 1.25
                    cap = math.ceil(Fraction(str(factor)) * sum(loads) / (num_ranks * slots_per_rank))
                    kept += min(load, cap * replicas)
                routed += load
            # Replicas in slot order; the first m of r take floor(m * load / r) together.
            rank_load = [0] * num_ranks
            seen = [0] * trace.num_experts
            for slot, e in enumerate(slots):
                r = slots.count(e)
                rank_load[slot // slots_per_rank] += (seen[e] + 1) * loads[e] // r - seen[e] * loads[e] // r
                seen[e] += 1
            imbalances.append(np.float64(max(rank_load)) / np.float64(sum(rank_load) / num_ranks))
            since += loads
            if not current and (step + 1) % every == 0:
                placement = policy(since.copy(), cluster, placement)
                since[:] = 0
    return kept / routed, math.fsum(imbalances) / len(imbalances)


@pytest.mark.parametrize("name", ["static", "proportional", "balanced", "auto", "random"])
@pytest.mark.parametrize("factor", [1.0, 1.25, None])
def test_survival_and_imbalance_equal_an_independent_computation(name, factor):
    trace = a_trace()
    result = simulate(trace, Scenario(MODEL, A100, 3, factor), [name]).results[name]
    survival, imbalance = by_hand(trace, get_policy(name), 1, factor, 3, 4)
    assert result.mean_survival == survival
    assert result.mean_rank_imbalance == imbalance


def test_forced_interval_uses_the_loads_since_the_last_decision():
    trace = a_trace()
    system = System("every 3", get_policy("proportional"), every_n_steps=3)
    result = simulate(trace, Scenario(MODEL, A100, 3), [system]).results["every 3"]
    assert result.mean_survival == by_hand(trace, get_policy("proportional"), 3, 1.0, 3, 4)[0]


def test_a_decision_takes_effect_one_step_later():
    # All load on expert 0, then all on expert 1: a step late, proportional has one slot for the new favourite.
    counts = np.zeros((3, 1, 1, 4), dtype=np.int64)
    counts[0, 0, 0, 0] = counts[1, 0, 0, 0] = counts[2, 0, 0, 1] = 80
    model = ModelShape(64, 256, 1, 1, 4)
    sim = simulate(LoadTrace(counts, np.arange(3), 1), Scenario(model, A100, 2), ["static", "proportional", "oracle"])
    # 8 slots of 10 assignments: 2 replicas keep 20 of 80, 5 keep 50, 1 keeps 10.
    assert sim.results["static"].survival.tolist() == [0.25, 0.25, 0.25]
    assert sim.results["proportional"].survival.tolist() == [0.25, 0.625, 0.125]
    assert sim.results["oracle"].survival.tolist() == [0.625, 0.625, 0.625]


@pytest.mark.parametrize("seed", range(3))
def test_oracle_is_an_upper_bound(seed):
    names = ["static", "flexmoe", "flexmoe_10", "proportional", "balanced", "random", "auto", "oracle"]
    results = simulate(a_trace(seed=seed), Scenario(MODEL, A100, 3), names).results
    for name in names:
        assert (results["oracle"].survival >= results[name].survival).all(), name


def test_oracle_counts_are_optimal():
    rng = np.random.default_rng(5)
    cluster = ClusterShape(4, 2, 3)
    for _ in range(50):
        loads, cap = rng.integers(0, 60, 3), int(rng.integers(1, 20))
        best = max(
            sum(min(load, cap * r) for load, r in zip(loads.tolist(), (a, b, 8 - a - b), strict=True))
            for a in range(1, 7)
            for b in range(1, 8 - a)
        )
        counts = surviving_replicas(loads, cluster, cap)
        assert counts.sum() == 8
        assert counts.min() >= 1
        assert np.minimum(loads, cap * counts).sum() == best


def test_global_loads_survive_as_the_same_loads_by_rank_do():
    trace = a_trace()
    merged = LoadTrace(trace.counts.sum(axis=2, keepdims=True), trace.steps, trace.top_k)
    names = ["static", "proportional", "balanced"]
    by_rank = simulate(trace, Scenario(MODEL, A100, 3), names).results
    spread = simulate(merged, Scenario(MODEL, A100, 3), names).results
    for name in names:
        assert by_rank[name].mean_survival == spread[name].mean_survival
        assert by_rank[name].mean_rank_imbalance == spread[name].mean_rank_imbalance


def test_only_bound_state_migrates():
    names = ["static", "flexmoe_2", "proportional", "swiftmoe_published", "random", "oracle"]
    results = simulate(a_trace(), Scenario(MODEL, A100, 3), names).results
    moved = {name: result.migration_bytes for name, result in results.items()}
    assert moved.pop("flexmoe_2") > 0
    assert set(moved.values()) == {0.0}
    assert results["random"].moved_residents.sum() > 0


def test_files_hold_the_same_numbers(tmp_path):
    sim = simulate(a_trace(), Scenario(MODEL, A100, 3), ["static", "proportional"])
    sim.write(tmp_path)
    content = read_simulation(tmp_path)
    header, *rows = (tmp_path / "simulation.csv").read_text().splitlines()
    for row in rows:
        values = dict(zip(header.split(","), row.split(","), strict=True))
        result = sim.results[values["policy"]]
        assert float(values["mean_survival"]) == result.mean_survival
        assert float(values["mean_step_s"]) == pytest.approx(
            sum(float(values[k]) for k in values if k.endswith("_s") and "step" not in k)
        )
        assert content["policies"][values["policy"]]["summary"]["mean_survival"] == result.mean_survival
    assert json.dumps(content).count("NaN") == 0


def test_spread_keeps_shares_and_tokens_per_rank():
    spread = a_trace().spread(8)
    assert spread.counts.shape == (12, 2, 1, 6)
    assert (spread.counts.sum(axis=2) == 2 * a_trace().counts.sum(axis=2)).all()


@pytest.mark.parametrize(
    ("policies", "change", "message"),
    [
        (
            ["nope"],
            {},
            "unknown policy 'nope'; there are auto, balanced, exact, exact_copies, flexmoe, flexmoe_N, llep",
        ),
        (["flexmoe_0"], {}, "unknown policy 'flexmoe_0'"),
        ([], {}, "no policies to simulate"),
        (["static"], {"num_experts": 5}, "the trace routes to 6 experts, the model has 5"),
        (["static"], {"top_k": 1}, "the trace has top_k=2, the model top_k=1"),
    ],
)
def test_what_does_not_fit_is_named(policies, change, message):
    model = ModelShape(**{**MODEL.__dict__, **change})
    with pytest.raises(ValueError, match=message):
        simulate(a_trace(), Scenario(model, A100, 3), policies)


def test_too_few_slots_and_wrong_ranks():
    with pytest.raises(ValueError, match="smallest slots_per_rank that works is 2"):
        Scenario(MODEL, A100, 1)
    with pytest.raises(ValueError, match=r"the trace has 3 ranks, the cluster 4; .* spread=true"):
        simulate(a_trace(3), Scenario(MODEL, A100, 3), ["static"])
    with pytest.raises(ValueError, match="capacity_factor must be above zero"):
        Scenario(MODEL, A100, 3, 0.0)
