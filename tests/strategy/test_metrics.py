"""What is logged of a step, against torchmetrics and loops over its layers."""

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.metrics import (
    ExcessLoad,
    ExpertImbalance,
    RankImbalance,
    ReplicasMoved,
    TokenSurvival,
    load_metrics,
)
from lightning_swiftmoe.placement import RandomPolicy, uniform
from lightning_swiftmoe.step import LayerStep


def some_layer(rng, num_ranks, num_experts, largest):
    cluster = ClusterShape(num_ranks, 2 * num_experts, num_experts)
    counts = rng.integers(0, largest, (num_ranks, num_experts))
    before = uniform(cluster)
    after = RandomPolicy()(counts.sum(axis=0), cluster, before)
    return LayerStep("a", counts, counts.sum(axis=1) // 2, 0.5, before, after, top_k=2)


def mean_over_layers(values):
    metric = MeanMetric()
    metric.update(torch.tensor(values))
    return metric.compute().item()


def excess(loads):
    beyond = [max(load - 1.1 * np.mean(loads), 0) for load in loads]
    return float(np.sum(beyond)) / np.sum(loads) if np.sum(loads) else 0.0


def imbalance(loads):
    return float(np.max(loads) / np.mean(loads)) if np.sum(loads) else 1.0


@pytest.mark.parametrize("num_layers", [1, 2, 12, 61])
@pytest.mark.parametrize("largest", [1, 3, 10**9])
def test_to_the_last_digit(num_layers, largest):
    rng = np.random.default_rng(num_layers)
    layers = [some_layer(rng, int(rng.integers(1, 9)), int(rng.integers(1, 65)), largest) for _ in range(num_layers)]
    got = load_metrics(layers)
    routed = sum(int(layer.counts.sum()) for layer in layers)
    processed = sum(int(layer.rank_load.sum()) for layer in layers)
    moved = 0
    for layer in layers:
        pairs = zip(layer.next_placement.table.tolist(), layer.placement.table.tolist(), strict=True)
        moved += sum(len(set(new) - set(old)) for new, old in pairs)
    assert got == {
        "moe/expert_imbalance": mean_over_layers([imbalance(layer.counts.sum(axis=0)) for layer in layers]),
        "moe/rank_imbalance": mean_over_layers([imbalance(layer.rank_load) for layer in layers]),
        "moe/excess_load": pytest.approx(mean_over_layers([excess(layer.rank_load) for layer in layers]), abs=1e-6),
        "moe/replicas_moved": moved,
        "moe/token_survival": processed / routed if routed else 1.0,
    }


def test_metrics_of_many_steps():
    """What observers add up themselves: the mean over all layers of all steps, or their sum."""
    rng = np.random.default_rng(0)
    steps = [[some_layer(rng, 3, 8, 50) for _ in range(2)] for _ in range(4)]
    metrics = {
        "moe/expert_imbalance": ExpertImbalance(),
        "moe/rank_imbalance": RankImbalance(),
        "moe/excess_load": ExcessLoad(),
        "moe/replicas_moved": ReplicasMoved(),
        "moe/token_survival": TokenSurvival(),
    }
    for layers in steps:
        for metric in metrics.values():
            metric.update(*layers)
    got = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert got == pytest.approx(load_metrics([layer for layers in steps for layer in layers]))
