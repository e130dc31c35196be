"""Rows to the ranks that host their experts and back, planned on the device: what the transports have in common.

A token's row travels twice in the forward (to its expert and back) and twice in the backward, each time between the
same two places. A ``RowTrip`` knows both for one forward of one layer; the transports differ in how they carry rows.

Shape suffixes: T tokens, D hidden size, K top-k, N ranks, E experts, P padded rows of this rank as a host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import to_device
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout
from lightning_swiftmoe.kernels.expert_mlp.rows_mlp import Spill
from lightning_swiftmoe.kernels.indirect import Indirect
from lightning_swiftmoe.kernels.launch import next_power_of_2
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize, TokenPlan, Turns
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.symmetric_copies import SymmetricCopies
from lightning_swiftmoe.placement import Placement, TokenRule, slot_capacity
from lightning_swiftmoe.placement.capacity import USUAL_LOAD
from lightning_swiftmoe.placement.exact_split import turn_table

T = TypeVar("T")
OfTokens: TypeAlias = Tensor | Indirect
Way: TypeAlias = Literal["forward", "backward"]


class RowTrip(ABC):
    """The way of one batch of tokens to the hosts of their experts and back. It may be taken again.

    ``travel`` runs work that calls ``to_hosts`` or ``gradients_to_hosts``, ``offer`` and ``to_tokens`` in this order;
    what the attributes say is known from then on.

    Attributes:
        layout: where the rows that arrive here stand.
        counts: ``[N, E]`` int64, what all ranks routed.
        rank_load: ``[N]`` int64, assignments that every rank processes.
        dtype: of the rows that travel.
        resends_tokens: whether tokens travel once more in a backward rather than wait here for it.
        has_ended: whether nobody will use the trip again, nor what its travels gave.
    """

    layout: RowLayout
    counts: Tensor
    rank_load: Tensor
    dtype: torch.dtype
    resends_tokens: bool = False
    has_ended: bool = False

    def travel(self, way: Way, key: Hashable, work: Callable[..., T], *tensors: Tensor) -> T:
        """The result of ``work``, given what stands for ``tensors``. It may be recorded, and replayed another time.

        Args:
            way: of the rows of tokens, or of their gradients.
            key: all that the launches of ``work`` depend on beside the trip and the shapes and dtypes of ``tensors``;
                None: they cannot be recorded.
            work: launches kernels; it hands what it is given to the methods below only.
            tensors: of this rank's tokens, contiguous and on 16-byte boundaries: other ones on every step.
        """
        return work(*tensors)

    @abstractmethod
    def to_hosts(self, tokens_TD: OfTokens, weights_TK: OfTokens) -> tuple[Tensor, Tensor]:
        """Each token's row, as ``dtype``, to the host of each of its experts.

        Args:
            tokens_TD: what travels.
            weights_TK: a number for each assignment that travels along.

        Returns:
            ``[P, D]`` what arrives here, zeros in the padding, and the numbers in fp32 at least, ``[P]``, anything in
            the padding. Both are to be used up before ``offer``, but rows stay where tokens are not sent again.
        """

    @abstractmethod
    def gradients_to_hosts(self, grads_TD: OfTokens, tokens_TD: OfTokens | None = None) -> tuple[Tensor, Tensor | None]:
        """Gradients the way that their tokens took, and the tokens once more, if they are given.

        Returns:
            ``[P, D]`` gradients and tokens that arrive here, zeros in the padding. Both are to be used up before the
            second call from now, of whatever trip.
        """

    @abstractmethod
    def offer(self, rows_PD: Tensor, scalars_P: Tensor | None = None) -> None:
        """The results for ``to_tokens`` are there: other ranks may fetch theirs. What follows overlaps with that."""

    @abstractmethod
    def to_tokens(self, rows_PD: Tensor, out_TD: OfTokens, weights_TK: OfTokens | None = None) -> None:
        """Each row that was offered back to the token that it came from: the sum over each token's experts.

        Args:
            rows_PD: results by row.
            out_TD: what is written; dropped assignments count zero.
            weights_TK: multiply a token's results before they are added up; None for ones.
        """

    @abstractmethod
    def scalars_to_tokens(self, scalars_P: Tensor, out_TK: OfTokens) -> None:
        """Each number that was offered to its assignment, after ``to_tokens``; zero for dropped ones.

        Args:
            scalars_P: a number for each row, fp32 at least.
            out_TK: what is written, in the dtype of the numbers.
        """

    def with_loans(self, grad_up: Tensor | None, grad_down: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of residents, once those of what other ranks have borrowed joined them; behind ``to_tokens``.

        Args:
            grad_up, grad_down: ``[>= R, rows, cols]``, copies of this rank last; changed in place. None: not wanted.
        """
        return grad_up, grad_down

    @abstractmethod
    def result_buffer(self, like_PD: Tensor) -> Tensor | None:
        """Where the rows of ``to_tokens`` should be written so that they travel without a copy; None: anywhere."""

    def workspace(self, width: int) -> Tensor | None:
        """``[P, width]`` as ``dtype``, for what is not needed after a travel; None: take any memory."""
        return None

    def spill_memory(self, width: int) -> Tensor | None:
        """More of it, for ``spill``; None: what arrives is never so much more than usual that it should not be kept."""
        return None

    def spill(self, memory: Tensor) -> Spill:
        """Which of the rows that arrived are not kept, once they have."""
        raise NotImplementedError

    def end(self) -> None:
        """The last backward is over."""
        self.has_ended = True


class TokenBound:
    """The most assignments that any rank routes in a forward, which bounds every buffer; agreed upon on the hosts.

    Args:
        control: a communicator on the host.
    """

    def __init__(self, control: Communicator) -> None:
        self._control = control
        self._most = 0
        self._agreed = False

    def begin_forward(self) -> None:
        """The next layer agrees anew: batches may have another size."""
        self._agreed = False

    def of(self, num_assignments: int, name: str) -> int:
        """The bound, which never falls, of a forward in which this rank routes so many.

        Raises:
            ValueError: more than what the ranks agreed on at the first layer of this forward.
        """
        if not self._agreed:
            self._agreed = True
            self._most = max(self._most, self._control.largest(num_assignments, name), 1)
        if num_assignments > self._most:
            raise ValueError(
                f"layer {name!r} routes {num_assignments} assignments, more than the {self._most} that the ranks "
                "agreed on for this forward: give all MoE layers of a forward the same number of tokens, or the "
                "largest first"
            )
        return self._most


@dataclass(frozen=True, eq=False)
class Routed:
    """What one rank wants to send in a forward of a layer.

    Args:
        topk_idx: ``[T, K]`` experts of the local tokens.
        counts: ``[E]`` int64, how many of them name each expert.
        width: of the rows that will travel, ``D``.
        dtype: of those rows.
    """

    topk_idx: Tensor
    counts: Tensor
    width: int
    dtype: torch.dtype


class RowExchange(ABC):
    """Plans trips over one transport.

    Attributes:
        needs_host: whether a trip waits for the host, so that no graph of a user's can hold it.
    """

    needs_host: bool = True

    @abstractmethod
    def plan(self, routed: Routed, tables: PlacementTables, name: str, *, training: bool) -> RowTrip:
        """The trip of what was routed.

        Args:
            routed: by this rank.
            tables: the placement.
            name: of the layer, for error messages.
            training: whether the like will be asked for again and again, so that preparing for it pays.
        """


@dataclass(frozen=True, eq=False)
class PlacementTables:
    """A placement as the device needs it.

    Args:
        placement: which.
        packed: ``[N E + E]`` int32 on the device, ``multiplicity`` and ``replicas``; with an exact split, the number of
            turns and their table ``[C, 3, N]`` behind them.
        capacity_factor: None processes every token.
        rule: which assignments are kept, and who processes them.
        copies: where this rank has the experts that it borrows; None: it borrows none.
    """

    placement: Placement
    packed: Tensor
    capacity_factor: float | None
    rule: TokenRule
    copies: SymmetricCopies | None

    @classmethod
    def on(
        cls,
        device: torch.device,
        placement: Placement,
        capacity_factor: float | None,
        rule: TokenRule,
        copies: SymmetricCopies | None,
    ) -> PlacementTables:
        """Copies to the device without waiting for it."""
        parts = [placement.multiplicity, placement.replicas]
        if rule.split == "exact":
            turns = turn_table(placement)
            # Room for more, so that another placement seldom needs memory of another size.
            rows = max(next_power_of_2(len(turns)), 2 * placement.slots_per_rank)
            parts += [np.array([len(turns)]), turns, np.zeros((rows - len(turns), *turns.shape[1:]))]
        packed = np.concatenate([part.ravel() for part in parts]).astype(np.int32)
        return cls(placement, to_device(torch.from_numpy(packed), device), capacity_factor, rule, copies)

    def plan(self, counts: Tensor, rank: int, size: PlanSize, packed: Tensor | None = None) -> TokenPlan:
        """The plan of a rank for ``counts[N, E]``, by the tables or a copy of them on the device."""
        packed = self.packed if packed is None else packed
        num_ranks, num_experts = counts.shape
        pairs = num_ranks * num_experts
        multiplicity = self.multiplicity(packed)
        replicas = packed[pairs : pairs + num_experts]
        turns = None
        if self.rule.split == "exact":
            number, table = packed[pairs + num_experts :].split([1, packed.numel() - pairs - num_experts - 1])
            turns = Turns(table.view(-1, 3, num_ranks), number)
        return plan_tokens(counts, multiplicity, replicas, rank, size, self.capacity, turns)

    @property
    def capacity(self) -> Capacity | None:
        """For ``plan_tokens``."""
        if self.capacity_factor is None:
            return None
        return Capacity(self.capacity_factor, self.placement.table.size, self.rule.capacity_scope)

    def multiplicity(self, packed: Tensor) -> Tensor:
        """``[N, E]`` int32 of the tables or a copy of them."""
        num_ranks, num_experts = self.placement.num_ranks, self.placement.num_experts
        return packed[: num_ranks * num_experts].view(num_ranks, num_experts)

    @property
    def max_residents(self) -> int:
        """The most distinct experts that a rank may host, and those that it may borrow."""
        hosted = min(self.placement.slots_per_rank, self.placement.num_experts)
        return hosted + self.rule.transient_copies

    def usual_rows(self, num_assignments: int, tile: int) -> int | None:
        """Rows, in whole tiles, that a rank seldom exceeds; None where a capacity keeps it within what it should have.

        Args:
            num_assignments: ``tokens * top_k`` of the rank that has most.
            tile: rows to which each resident is padded.
        """
        if self.capacity_factor is not None and self._slots_bound_ranks:
            return None
        rows = int(np.ceil(USUAL_LOAD * num_assignments)) + self.max_residents * (tile - 1)
        return -(-rows // tile) * tile

    @property
    def _slots_bound_ranks(self) -> bool:
        scope = self.rule.capacity_scope
        return scope == "pooled" or (scope == "cluster" and self.rule.split == "even")

    def max_rows(self, num_assignments: int, tile: int) -> int:
        """Rows, in whole tiles, that no rank can exceed whatever is routed: a bound known without the counts.

        Split evenly, a rank with ``m`` of the ``r`` replicas of an expert processes at most ``ceil(m / r)`` of its
        assignments, so all of them together at most the largest ``m / r`` of all assignments, and one more for each
        resident; split exactly, it may get all. With a capacity counted over the cluster or a rank's slots together,
        the slots bound it too.

        Args:
            num_assignments: ``tokens * top_k`` of all ranks, or more.
            tile: rows to which each resident is padded.
        """
        share = (self.placement.multiplicity / self.placement.replicas).max() if self.rule.split == "even" else 1.0
        rows = int(np.ceil(share * num_assignments)) + self.max_residents
        if self.capacity_factor is not None and self._slots_bound_ranks:
            slot = slot_capacity(self.capacity_factor, num_assignments, self.placement.table.size)
            rows = min(rows, slot * self.placement.slots_per_rank)
        rows = min(rows, num_assignments) + self.max_residents * (tile - 1)
        return -(-max(rows, 1) // tile) * tile
