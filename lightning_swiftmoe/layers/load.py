"""What one MoE layer was asked to do since the last step: the input of placement policies and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LayerLoad:
    """Loads of one forward pass or of one step, the same on every rank of an expert group of ``N`` ranks.

    Args:
        counts: ``[N, E]`` int64 assignments routed by each rank, before drops.
        rank_load: ``[N]`` int64 assignments processed by each rank, after drops.
        aux_loss: this rank's share of the load-balance loss, summed over ``num_forwards`` passes; detached.
        num_forwards: passes added up, like ``aux_loss``: of a number torch.compile would make a graph for each value.
        everywhere: ``[E]`` assignments of all expert groups' ranks that biases follow; None: all in ``counts``.
    """

    counts: Tensor
    rank_load: Tensor
    aux_loss: Tensor
    num_forwards: Tensor
    everywhere: Tensor | None = None

    @classmethod
    def of_one_forward(
        cls, counts: Tensor, rank_load: Tensor, aux_loss: Tensor, everywhere: Tensor | None = None
    ) -> LayerLoad:
        """One pass."""
        return cls(counts, rank_load, aux_loss, torch.ones_like(aux_loss), everywhere)

    @classmethod
    def without_losses(cls, counts: Tensor, rank_load: Tensor) -> LayerLoad:
        """One pass with no losses of ours, that moves no biases: in eval mode, or where the router is the model's."""
        zero = torch.zeros((), dtype=torch.float64, device=counts.device)
        return cls(counts, rank_load, zero, zero, counts.new_zeros(counts.shape[1]))

    @property
    def by_expert(self) -> Tensor:
        """``[E]`` assignments that biases follow, of all ranks of the job."""
        return self.counts.sum(dim=0) if self.everywhere is None else self.everywhere

    def __add__(self, other: LayerLoad) -> LayerLoad:
        one_group = self.everywhere is None and other.everywhere is None
        return LayerLoad(
            self.counts + other.counts,
            self.rank_load + other.rank_load,
            self.aux_loss + other.aux_loss,
            self.num_forwards + other.num_forwards,
            None if one_group else self.by_expert + other.by_expert,
        )


def no_load(num_ranks: int, num_experts: int, device: torch.device) -> LayerLoad:
    """Of a step without a forward."""
    counts = torch.zeros(num_ranks, num_experts, dtype=torch.int64, device=device)
    zero = counts.sum().double()
    return LayerLoad(counts, counts.sum(dim=1), zero, num_forwards=zero)


def in_backward() -> bool:
    """Activation checkpointing replays the forward inside the backward pass; what it counts was counted before.

    Compiled code does not: its backward repeats tensor operations, never Python.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def counts_as_training(in_train_mode: bool) -> bool:
    """Whether a forward that runs now is one of training: its load counts, and its gradients will be exchanged.

    In train mode, or with gradients: what ``from_pretrained`` returns is in eval mode, and Lightning leaves it there.
    What activation checkpointing repeats in the backward was counted before.
    """
    return (in_train_mode or torch.is_grad_enabled()) and not in_backward()


@dataclass(frozen=True)
class HostLoad:
    """A ``LayerLoad`` of one step on the host, without ``everywhere``.

    Args:
        counts: ``[N, E]`` assignments routed by each rank, before drops.
        rank_load: ``[N]`` assignments processed by each rank, after drops.
        aux_loss: this rank's share of the load-balance loss, summed over ``num_forwards`` passes.
        num_forwards: passes added up.
    """

    counts: NDArray[np.int64]
    rank_load: NDArray[np.int64]
    aux_loss: float
    num_forwards: int

    def __add__(self, other: HostLoad) -> HostLoad:
        return HostLoad(
            self.counts + other.counts,
            self.rank_load + other.rank_load,
            self.aux_loss + other.aux_loss,
            self.num_forwards + other.num_forwards,
        )


class HostLoads:
    """Loads on their way to the host, in one copy that nobody waits for until they are needed.

    Args:
        loads: of one step; their values may not change afterwards.
    """

    def __init__(self, loads: list[LayerLoad]) -> None:
        self._loads = loads
        self._event: torch.cuda.Event | None = None
        if not loads:
            return
        integers = torch.cat([part for load in loads for part in (load.counts.flatten(), load.rank_load)])
        losses = torch.cat([part.view(1) for load in loads for part in (load.aux_loss, load.num_forwards)])
        # Counts are exact in fp64 up to 2^53.
        flat = torch.cat([integers.double(), losses.double()])
        if flat.device.type == "cuda":
            self._flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._flat.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._flat = flat

    def wait(self) -> list[HostLoad]:
        """The same loads on the host."""
        if not self._loads:
            return []
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        # One conversion for all layers: what is left for each of them are views.
        flat = self._flat.numpy()
        num_integers = flat.size - 2 * len(self._loads)
        integers = flat[:num_integers].astype(np.int64)
        losses = flat[num_integers:].reshape(-1, 2).tolist()
        on_host, start = [], 0
        for load, (aux_loss, num_forwards) in zip(self._loads, losses, strict=True):
            num_ranks, num_experts = load.counts.shape
            middle = start + num_ranks * num_experts
            end = middle + num_ranks
            counts = integers[start:middle].reshape(num_ranks, num_experts)
            on_host.append(HostLoad(counts, integers[middle:end], aux_loss, int(num_forwards)))
            start = end
        return on_host


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
