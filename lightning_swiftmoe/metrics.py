"""torchmetrics of expert load. Their inputs are global already, so they never communicate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_swiftmoe.step import LayerStep


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
        self.processed += float(sum(layer.rank_load.sum() for layer in layers))
        self.routed += float(sum(layer.counts.sum() for layer in layers))

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
    """Mean over layers of max/mean load of the ranks, after drops; 1.0 is even."""

    def __init__(self) -> None:
        super().__init__("rank_imbalance")


class ExpertImbalance(_LayerMean):
    """Mean over layers of max/mean load of the experts, before drops; 1.0 is even."""

    def __init__(self) -> None:
        super().__init__("expert_imbalance")


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


def load_metrics() -> MetricCollection:
    """The metrics that ``ExpertRebalancer`` logs, a fixed number whatever the number of layers."""
    return MetricCollection(
        {
            "moe/token_survival": TokenSurvival(),
            "moe/rank_imbalance": RankImbalance(),
            "moe/expert_imbalance": ExpertImbalance(),
            "moe/replicas_moved": ReplicasMoved(),
        },
        compute_groups=False,
    )
