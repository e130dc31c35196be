"""Expert groups in the simulator: each is a cluster of its own, and gradients are added up between them."""

import dataclasses

import numpy as np
import pytest

from lightning_swiftmoe.simulate import (
    Efficiency,
    Hardware,
    LoadTrace,
    ModelShape,
    Scenario,
    Workload,
    generate,
    simulate,
)

NODES = Hardware("A100", 312, 2039, 80, 32, 100, 5, gpus_per_node=2, num_nodes=2, nvlink_GBps=300)
MODEL = ModelShape(dim=64, ffn_dim=256, num_layers=2, num_moe_layers=2, num_experts=6, top_k=2)
IDEAL = Efficiency.ideal()


def a_trace():
    work = Workload(12, 1, 6, tokens=480, top_k=2, num_ranks=4, seed=0, skew=1.0, pace=5.0)
    return generate("drift", work)


def part(trace, ranks):
    return LoadTrace(trace.counts[:, :, ranks], trace.steps, trace.top_k)


@pytest.mark.parametrize("name", ["proportional", "balanced", "oracle", "swiftmoe_published"])
@pytest.mark.parametrize("size", [1, 2])
def test_groups_are_clusters_of_their_own(name, size):
    trace, scenario = a_trace(), Scenario(MODEL, NODES, 8, 1.0, efficiency=IDEAL)
    together = dataclasses.replace(scenario, expert_parallel_size=size)
    got = simulate(trace, together, [name]).results[name]
    alone = dataclasses.replace(scenario, hardware=NODES.with_ranks(size))
    parts = [slice(first, first + size) for first in range(0, 4, size)]
    groups = [simulate(part(trace, ranks), alone, [name]).results[name] for ranks in parts]
    num_groups = len(groups)

    routed = [trace.counts[:, :, ranks].sum() for ranks in parts]
    kept = sum(group.mean_survival * count for group, count in zip(groups, routed, strict=True))
    assert got.mean_survival == pytest.approx(kept / sum(routed), rel=1e-12)
    assert got.rank_load.tolist() == np.concatenate([group.rank_load for group in groups], axis=1).tolist()
    assert got.replicas.tolist() == sum(group.replicas for group in groups).tolist()
    assert got.moved_residents.tolist() == sum(group.moved_residents for group in groups).tolist()

    # A ring all-reduce of each rank's shards in bf16, and of the counts in 8 bytes.
    shards = 2 * (num_groups - 1) / num_groups * 6 * MODEL.expert_params / size * 2
    counts = 2 * (num_groups - 1) / num_groups * 6 * 8
    # Groups of two fill their nodes: all of it passes the NIC, at 12.5 GB/s and 5 us. Of four single ranks, each has
    # one of its three partners beside it.
    outside, latency_s = {2: (1, 5e-6), 1: (2 / 3, 10e-6)}[size]
    between = {"gradient": shards, "load": counts}
    for phase in ("load", "dispatch", "experts", "combine", "backward", "gradient", "optimizer", "weight"):
        slowest_s = np.max([group.phase_s[phase] for group in groups], axis=0)
        more_s = outside * between[phase] / 12.5e9 + latency_s if phase in between else 0.0
        assert np.allclose(got.phase_s[phase], slowest_s + more_s, rtol=1e-12), phase
    for phase in ("load", "dispatch", "combine", "backward", "gradient", "weight"):
        sent = sum(group.phase_bytes[phase] for group in groups) + 4 * between.get(phase, 0.0)
        assert np.allclose(got.phase_bytes[phase], sent, rtol=1e-12), phase
    whole = simulate(trace, scenario, [name]).results[name]
    assert got.phase_s["dense"].tolist() == whole.phase_s["dense"].tolist()
    assert got.phase_bytes["dense"].tolist() == whole.phase_bytes["dense"].tolist()


def test_sums_are_shared_evenly_by_groups():
    trace = a_trace()
    sums = LoadTrace(trace.counts.sum(axis=2, keepdims=True), trace.steps, trace.top_k)
    twice = LoadTrace(2 * sums.counts, trace.steps, trace.top_k)
    groups = Scenario(MODEL, NODES, 8, 1.0, expert_parallel_size=2)
    got = simulate(twice, groups, ["balanced"]).results["balanced"]
    one = simulate(sums, Scenario(MODEL, NODES.with_ranks(2), 8, 1.0), ["balanced"]).results["balanced"]
    assert got.survival.tolist() == one.survival.tolist()
    assert got.rank_load.tolist() == np.tile(one.rank_load, 2).tolist()


def test_one_group_named_or_not_is_the_same():
    named, default = (
        simulate(a_trace(), Scenario(MODEL, NODES, 3, expert_parallel_size=size), ["static", "proportional"]).to_json()
        for size in (4, None)
    )
    assert named["policies"] == default["policies"]


def test_refusals():
    with pytest.raises(ValueError, match=r"expert_parallel_size = 3 must divide the 4 rank\(s\)"):
        Scenario(MODEL, NODES, 3, expert_parallel_size=3)
    nodes = dataclasses.replace(NODES, gpus_per_node=3, num_nodes=4)
    with pytest.raises(ValueError, match="expert_parallel_size = 2 leaves groups that share nodes of 3 devices"):
        Scenario(MODEL, nodes, 3, expert_parallel_size=2)
    with pytest.raises(ValueError, match="needs state that is cut evenly over a group, but static, flexmoe_10 binds"):
        simulate(a_trace(), Scenario(MODEL, NODES, 3, expert_parallel_size=2), ["static", "flexmoe_10", "balanced"])
