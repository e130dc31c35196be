"""What happened in one optimizer step: values handed from the engine to its observers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.parallel.traffic import Traffic
from lightning_swiftmoe.placement import Placement
from lightning_swiftmoe.placement.capacity import USUAL_LOAD
from lightning_swiftmoe.placement.placement import IntArray


@dataclass(frozen=True)
class LayerStep:
    """One MoE layer in one step; the same on every rank.

    Args:
        name: the layer's name in the user's module.
        counts: ``[N, E]`` assignments routed by each rank, before drops.
        rank_load: ``[N]`` assignments processed by each rank.
        aux_loss: the load-balance loss, averaged over the step's forwards; None where the model has its own.
        placement: in force during the step.
        next_placement: in force from now on.
        top_k: assignments per token.
    """

    name: str
    counts: IntArray
    rank_load: IntArray
    aux_loss: float | None
    placement: Placement
    next_placement: Placement
    top_k: int

    @cached_property
    def loads(self) -> IntArray:
        """``[E]`` assignments routed to each expert."""
        return self.counts.sum(axis=0)

    @property
    def num_routed(self) -> int:
        """Assignments routed."""
        return sum(self.loads.tolist())

    @property
    def num_processed(self) -> int:
        """Assignments processed, after drops."""
        return sum(self.rank_load.tolist())

    @property
    def num_tokens(self) -> float:
        """Tokens of the global batch."""
        return self.num_routed / self.top_k

    def with_aux_loss(self, aux_loss: float) -> LayerStep:
        """The same step with another loss, if it has one."""
        return self if self.aux_loss is None else replace(self, aux_loss=aux_loss)

    def facts_of(self, rank: int) -> NDArray[np.float64]:
        """``[E + 1 + s]`` what other expert groups must know of a rank of this one: counts, load, next slots."""
        facts = np.concatenate([self.counts[rank], self.rank_load[rank, None], self.next_placement.table[rank]])
        return facts.astype(np.float64)

    def on_all_ranks(self, facts: NDArray[np.float64], placement: Placement) -> LayerStep:
        """This step of one expert group as a step of the whole job.

        Args:
            facts: ``[W, E + 1 + s]`` of every rank of the job, whole numbers.
            placement: of all ``W`` ranks, in force during the step.
        """
        num_experts = self.placement.num_experts
        counts, rank_load, slots = np.split(facts.astype(np.int64), [num_experts, num_experts + 1], axis=1)
        return replace(
            self,
            counts=counts,
            rank_load=rank_load[:, 0],
            placement=placement,
            next_placement=Placement(slots, num_experts),
        )

    @property
    def survival(self) -> float:
        """Assignments processed per assignment routed; 1.0 where nothing was routed."""
        return self.num_processed / self.num_routed if self.num_routed else 1.0

    @property
    def rank_imbalance(self) -> float:
        """Largest over mean load of the ranks; 1.0 is even."""
        return imbalance(self.rank_load)

    @property
    def excess_load(self) -> float:
        """Assignments that ranks process beyond what is usual, per assignment processed; 0.0 where none has so many."""
        usual = USUAL_LOAD * self.num_processed / len(self.rank_load)
        return sum(max(load - usual, 0.0) for load in self.rank_load.tolist()) / max(self.num_processed, 1)

    @property
    def expert_imbalance(self) -> float:
        """Largest over mean load of the experts; 1.0 is even."""
        return imbalance(self.loads)


@dataclass(frozen=True)
class Step:
    """All layers of one step, and what this rank moved since the last one.

    Args:
        number: of the step, counted from 1 over all fits that a checkpoint continues.
        layers: each set of experts.
        traffic: by phase.
    """

    number: int
    layers: tuple[LayerStep, ...]
    traffic: Mapping[str, Traffic]


def imbalance(load: IntArray) -> float:
    """``max / mean``, 1.0 for an even load and for none at all."""
    # A dozen numbers: reductions of arrays would take several times longer.
    values = load.tolist()
    mean = sum(values) / len(values)
    return max(values) / mean if mean > 0 else 1.0
