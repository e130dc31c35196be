"""What one MoE layer was asked to do since the last step: the input of placement policies and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerLoad:
    """Loads of one forward pass or of one step, the same on every rank.

    Args:
        counts: ``[N, E]`` int64 assignments routed by each rank, before drops.
        rank_load: ``[N]`` int64 assignments processed by each rank, after drops.
        aux_loss: this rank's share of the load-balance loss, summed over ``num_forwards`` passes; detached.
        num_forwards: passes added up.
    """

    counts: Tensor
    rank_load: Tensor
    aux_loss: Tensor
    num_forwards: int = 1

    def __add__(self, other: LayerLoad) -> LayerLoad:
        return LayerLoad(
            self.counts + other.counts,
            self.rank_load + other.rank_load,
            self.aux_loss + other.aux_loss,
            self.num_forwards + other.num_forwards,
        )


def count_by_expert(idx: Tensor, num_experts: int) -> Tensor:
    """``[E]`` int64 occurrences of each expert in ``idx`` (any shape, no ``-1``), without a host synchronisation."""
    idx = idx.reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=idx.device)
    return counts.scatter_add_(0, idx, torch.ones_like(idx))


def positions_within(idx: Tensor, counts: Tensor) -> Tensor:
    """For each element of ``idx [n]``, how many equal ones stand before it.

    Example: ``idx = [2, 0, 2, 2]`` gives ``[0, 0, 1, 2]``.

    Args:
        idx: ``[n]`` int64.
        counts: occurrences of each value in ``idx``.
    """
    order = torch.sort(idx, stable=True).indices
    starts = counts.cumsum(0) - counts
    rank_in_group = torch.arange(idx.numel(), device=idx.device) - starts[idx[order]]
    return torch.empty_like(idx).scatter_(0, order, rank_in_group)
