"""What is logged of expert load: one number for all layers of a step, however many they are.

Layers are global already, so nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_swiftmoe.step import LayerStep


def load_metrics(layers: Sequence[LayerStep]) -> dict[str, float]:
    """Metrics of one step by name.

    * ``moe/expert_imbalance``: max/mean load of the experts before drops, mean over layers; 1.0 is even.
    * ``moe/rank_imbalance``: max/mean load of the ranks after drops, mean over layers; 1.0 is even.
    * ``moe/replicas_moved``: residents that reached a new rank, added over layers.
    * ``moe/token_survival``: assignments processed per assignment routed, over all layers; 1.0 when nothing was routed.

    Args:
        layers: of one step, at least one.
    """
    routed = sum(layer.num_routed for layer in layers)
    processed = sum(layer.num_processed for layer in layers)
    of_experts = [layer.expert_imbalance for layer in layers]
    of_ranks = [layer.rank_imbalance for layer in layers]
    # In fp32, as torchmetrics has it: logs stay comparable with older ones to the last digit.
    expert_imbalance, rank_imbalance = torch.tensor([of_experts, of_ranks]).mean(dim=1).tolist()
    return {
        "moe/expert_imbalance": expert_imbalance,
        "moe/rank_imbalance": rank_imbalance,
        "moe/replicas_moved": float(sum(layer.next_placement.moved_from(layer.placement) for layer in layers)),
        "moe/token_survival": processed / routed if routed else 1.0,
    }
