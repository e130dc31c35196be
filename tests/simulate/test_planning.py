"""Memory by hand, and limits that are really the smallest."""

import dataclasses

import pytest

from lightning_swiftmoe.cluster import min_slots
from lightning_swiftmoe.simulate import PAPER_MODELS, Hardware, ModelShape, Scenario
from lightning_swiftmoe.simulate.planning import (
    RUNTIME_BYTES,
    Run,
    largest_slots,
    memory_per_rank,
    modelled_step,
    smallest_ranks,
)

# P = 2 * 100 * 500 = 1e5 per expert, 8 experts in each of 2 layers.
MODEL = ModelShape(dim=100, ffn_dim=500, num_layers=2, num_moe_layers=2, num_experts=8, num_other_params=1000)


def hardware(hbm_gb, num_nodes=4):
    return Hardware("h", 100, 1000, hbm_gb, 32, 100, 5, 1, num_nodes)


def test_memory_by_hand():
    plan = memory_per_rank(MODEL, num_ranks=4, slots_per_rank=3, run=Run(10))
    assert plan.dense_bytes == 1000 * (4 + 4 + 4 + 8 + 2)  # weights, gradients, buckets, moments, copies
    assert plan.expert_weight_bytes == plan.expert_grad_bytes == 3 * 2 * 2 * 100_000
    assert plan.shard_bytes == plan.moment_bytes == 8 * 2 * 25_000 * 8
    assert plan.activation_bytes == 10 * (32 * 2 * 100 + 2 * 1100 + 10 * 50257)
    assert plan.row_bytes == 5 * 4 * 10 * 200
    everything = 22_000 + 2 * 1_200_000 + 2 * 3_200_000 + plan.activation_bytes + plan.row_bytes + RUNTIME_BYTES
    assert plan.device_bytes == everything
    assert memory_per_rank(MODEL, 4, 3, Run(10, offload=True)).device_bytes == everything - 6_400_000


def test_only_two_layers_have_gradients_on_their_way():
    deep = dataclasses.replace(MODEL, num_layers=6, num_moe_layers=6)
    assert memory_per_rank(deep, 4, 3, Run(10)).expert_grad_bytes == 3 * 2 * 2 * 100_000


def test_rows_by_transport_and_capacity():
    assert memory_per_rank(MODEL, 4, 3, Run(10, capacity_factor=1.0)).row_bytes == 5 * 10 * 200
    assert memory_per_rank(MODEL, 4, 3, Run(10, ranks_per_node=2)).row_bytes == 3 * 10 * 200
    assert memory_per_rank(MODEL, 1, 8, Run(10)).row_bytes == 0


def test_dense_weights_that_are_cut():
    model = dataclasses.replace(MODEL, vocab_size=2, num_other_params=1400)
    plan = memory_per_rank(model, 4, 3, Run(10, dense="fsdp2"))
    # 350 own elements; embeddings 2 * 2 * 100 and two blocks of 500 gathered; copies of all.
    assert plan.dense_bytes == 350 * 16 + 4 * (400 + 1000) + 2 * 1400


OLMOE = ModelShape(
    dim=2048,
    ffn_dim=1024,
    num_layers=16,
    num_moe_layers=16,
    num_experts=64,
    top_k=8,
    vocab_size=50304,
    gated=True,
    num_other_params=476_710_912,
    block_bytes=49,
)


@pytest.mark.parametrize(
    ("tokens", "recompute", "dense", "measured_gb"),
    [
        (8192, False, "ddp", 97.3),
        (16384, False, "ddp", 122.8),
        (16384, True, "ddp", 108.3),
        (8192, False, "fsdp2", 92.4),
    ],
)
def test_what_was_measured(tokens, recompute, dense, measured_gb):
    """docs/results/olmoe.md"""
    model = dataclasses.replace(OLMOE, recompute=recompute)
    plan = memory_per_rank(model, 2, 32, Run(tokens, dense=dense))
    assert plan.device_bytes == pytest.approx(measured_gb * 1e9, rel=0.1)


def test_shards_do_not_grow_with_slots():
    few, many = (memory_per_rank(MODEL, 4, s, Run(10)) for s in (2, 8))
    assert few.shard_bytes == many.shard_bytes
    assert many.expert_weight_bytes == 4 * few.expert_weight_bytes


@pytest.mark.parametrize("hbm_gb", [2.013, 2.017, 2.027, 2.057])
def test_limits_are_tight(hbm_gb):
    run = Run(10)
    found = smallest_ranks(MODEL, hardware(hbm_gb), run)

    def fits(num_ranks, slots):
        return memory_per_rank(MODEL, num_ranks, slots, run).device_bytes <= hbm_gb * 1e9

    assert found is not None
    assert fits(found, min_slots(8, found))
    assert not any(fits(n, min_slots(8, n)) for n in range(1, found))
    most = largest_slots(MODEL, hardware(hbm_gb), run)
    if most is None:
        assert not fits(4, 2)
    else:
        assert fits(4, most)
        assert most == 8 or not fits(4, most + 1)


def test_what_never_fits():
    assert smallest_ranks(MODEL, hardware(0.001), Run(10)) is None
    assert largest_slots(MODEL, hardware(0.001), Run(10)) is None


def test_modelled_step_counts_every_layer():
    model = PAPER_MODELS["gpt-small"]
    results = modelled_step(Scenario(model, hardware(80.0), 8), 512)
    for result in results.values():
        assert result.phase_s["weight"][0] > 0
        assert result.phase_bytes["migration"][0] == 0
    # Twelve layers of residents: W * residents * (N-1)/N received, added over ranks, is at most every slot.
    slots_bytes = 4 * 8 * model.weight_expert_bytes * 12 * 3 / 4
    assert 0 < results["exact"].phase_bytes["weight"][0] <= slots_bytes * (1 + 1e-9)
    assert results["exact"].mean_survival > results["static"].mean_survival
