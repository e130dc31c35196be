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


def loads_to_host(loads: list[LayerLoad]) -> list[LayerLoad]:
    """The same loads on the host, copied in one piece: one wait for the device however many layers."""
    if not loads:
        return []
    # Counts are exact in fp64 up to 2^53.
    flat = [torch.cat([x.counts.flatten(), x.rank_load, x.aux_loss.double()[None]]).double() for x in loads]
    host = torch.cat(flat).cpu().split([part.numel() for part in flat])
    result = []
    for load, values in zip(loads, host, strict=True):
        counts, rank_load, aux = values.split([load.counts.numel(), load.rank_load.numel(), 1])
        counts = counts.long().view(load.counts.shape)
        result.append(LayerLoad(counts, rank_load.long(), aux.squeeze(), load.num_forwards))
    return result


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
