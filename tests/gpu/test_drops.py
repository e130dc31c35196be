"""A capacity counted over the cluster: GPUs drop as one process that acts as so many ranks, on a GPU or on the host."""

import pytest

from tests.gpu.cases import HOPPER, TRANSPORTS, GpuJob, fit, fit_virtually, placed
from tests.gpu.rank_pool import NUM_RANKS
from tests.jobs import largest_error

pytestmark = pytest.mark.gpu

PLACES = ("device", "host")


def make(policy, top_k, transport="auto", **rule):
    moe = {**HOPPER, "capacity_factor": 1.0}
    options = {"policy": policy, "top_k": top_k, "transport": transport, "strategy": rule}
    return GpuJob(width=64, moe=moe, steps=4, slots=-(-6 // NUM_RANKS), **options)


def fit_virtually_at(job, place):
    return fit_virtually(job, NUM_RANKS, placed() if place == "device" else {})


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("policy", ["proportional", "static"])
def test_the_papers_rule_drops_the_same(one, several, policy, top_k, transport):
    check_against_virtual_ranks(one, several, policy, top_k, transport, capacity_scope="cluster", split="even")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rule", [("cluster", "exact"), ("pooled", "even"), ("pooled", "exact")])
def test_other_rules_drop_the_same(one, several, rule, transport):
    scope, split = rule
    check_against_virtual_ranks(one, several, "random", 2, transport, capacity_scope=scope, split=split)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_copies_drop_the_same(one, several, transport):
    rule = {"capacity_scope": "pooled", "split": "exact", "transient_copies": 1}
    check_against_virtual_ranks(one, several, "random", 2, transport, at_least_once=1.0, **rule)


def check_against_virtual_ranks(one, several, policy, top_k, transport, at_least_once=0.95, **rule):
    real = several.run(fit, make(policy, top_k, transport, **rule))[0]
    assert min(layer.survival for step in real.steps for layer in step.layers) < at_least_once
    for place in PLACES:
        virtual = one.run(fit_virtually_at, make(policy, top_k, **rule), place)[0]
        assert len(real.steps) == len(virtual.steps) == 4
        for step, other in zip(real.steps, virtual.steps, strict=True):
            for a, b in zip(step.layers, other.layers, strict=True):
                assert a.counts.tolist() == b.counts.tolist(), place
                assert a.rank_load.tolist() == b.rank_load.tolist(), place
                assert a.next_placement == b.next_placement, place
        assert largest_error(real.weights, virtual.weights) < 1e-5
