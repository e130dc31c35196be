"""Metrics of expert load, of one number for all layers of a step, however many they are.

``load_metrics`` is what every step logs; the classes are the same as torchmetrics, for observers that add up steps.
Layers are global already, so nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lightning_swiftmoe.step import LayerStep


def load_metrics(layers: Sequence[LayerStep]) -> dict[str, float]:
    """Metrics of one step by name.

    * ``moe/expert_imbalance``: max/mean load of the experts before drops, mean over layers; 1.0 is even.
    * ``moe/rank_imbalance``: max/mean load of the ranks after drops, mean over layers; 1.0 is even.
    * ``moe/excess_load``: assignments that ranks process beyond 1.1 times the mean, per assignment processed, mean over
      layers; 0.0 where no rank has so many. In layers without a capacity, with ``transport="symmetric"``, they are
      computed twice, as memory is kept for no more.
    * ``moe/replicas_moved``: residents that reached a new rank, added over layers.
    * ``moe/token_survival``: assignments processed per assignment routed, over all layers; 1.0 when nothing was routed.

    Args:
        layers: of one step, at least one.
    """
    routed = sum(layer.num_routed for layer in layers)
    processed = sum(layer.num_processed for layer in layers)
    of_experts = [layer.expert_imbalance for layer in layers]
    of_ranks = [layer.rank_imbalance for layer in layers]
    excess = [layer.excess_load for layer in layers]
    # In fp32, as torchmetrics has it.
    expert_imbalance, rank_imbalance, excess_load = torch.tensor([of_experts, of_ranks, excess]).mean(dim=1).tolist()
    return {
        "moe/expert_imbalance": expert_imbalance,
        "moe/rank_imbalance": rank_imbalance,
        "moe/excess_load": excess_load,
        "moe/replicas_moved": float(sum(layer.next_placement.moved_from(layer.placement) for layer in layers)),
        "moe/token_survival": processed / routed if routed else 1.0,
    }


class TokenSurvival(Metric):
    """Assignments processed per assignment routed, over all layers and steps seen; 1.0 when nothing was routed."""

    full_state_update = False
    processed: Tensor
    routed: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(sync_on_compute=False, **kwargs)
        self.add_state("processed", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("routed", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *layers: LayerStep) -> None:
        """Add the layers of one step."""
        self.processed += sum(layer.num_processed for layer in layers)
        self.routed += sum(layer.num_routed for layer in layers)

    def compute(self) -> Tensor:
        """Scalar in 0 .. 1."""
        return torch.where(self.routed > 0, self.processed / self.routed.clamp_min(1), 1.0)


class _LayerMean(MeanMetric):
    """Mean over layers and steps of one value of ``LayerStep``."""

    def __init__(self, value: str) -> None:
        super().__init__(nan_strategy="ignore", sync_on_compute=False)
        self.value = value

    def update(self, *layers: LayerStep) -> None:  # type: ignore[override]
        """Add the layers of one step."""
        super().update(torch.tensor([getattr(layer, self.value) for layer in layers]))


class RankImbalance(_LayerMean):
    """Mean over layers and steps of max/mean load of the ranks, after drops; 1.0 is even."""

    def __init__(self) -> None:
        super().__init__("rank_imbalance")


class ExpertImbalance(_LayerMean):
    """Mean over layers and steps of max/mean load of the experts, before drops; 1.0 is even."""

    def __init__(self) -> None:
        super().__init__("expert_imbalance")


class ExcessLoad(_LayerMean):
    """Mean over layers and steps of what ranks process beyond 1.1 times the mean, per assignment; 0.0 is none."""

    def __init__(self) -> None:
        super().__init__("excess_load")


class ReplicasMoved(Metric):
    """Residents that reached a new rank, added over layers and steps."""

    full_state_update = False
    moved: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(sync_on_compute=False, **kwargs)
        self.add_state("moved", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *layers: LayerStep) -> None:
        """Add the layers of one step."""
        self.moved += sum(layer.next_placement.moved_from(layer.placement) for layer in layers)

    def compute(self) -> Tensor:
        """A count."""
        return self.moved
