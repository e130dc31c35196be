"""Which assignments are kept and which host processes them: the capacity of experts and the split over replicas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.arguments import check_choice, check_count
from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement.capacity import CapacityScope, check_scope, keep_within_capacity, slot_capacity
from lightning_swiftmoe.placement.dispatch import host_share
from lightning_swiftmoe.placement.exact_split import exact_split, keep_within_ranks
from lightning_swiftmoe.placement.placement import IntArray, Placement
from lightning_swiftmoe.placement.transient_copies import LEAST_COPIED, copies_worth_room, with_copies

Split = Literal["even", "exact"]
"""Over the hosts of an expert: ``"even"`` by their slots (SwiftMoE), ``"exact"`` so that the busiest rank has least."""


@dataclass(frozen=True)
class Shares:
    """Of one dispatch, in assignments; the columns of both add up to the same.

    Args:
        kept: ``[N, E]`` of expert ``e`` that rank ``j`` has routed and keeps.
        hosted: ``[N, E]`` of expert ``e`` that rank ``j`` processes.
        copied: ``[N, E]`` whether it does so with a copy that it borrows; None: nobody does.
    """

    kept: IntArray
    hosted: IntArray
    copied: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class TokenRule:
    """How a layer treats its tokens; the same on all ranks.

    Args:
        capacity_scope: where capacity counts. ``"pooled"``: the slots of a rank share their room, whichever experts
            they hold. ``"cluster"``: an expert has that of its replicas, whoever routed to it. ``"rank"``: every rank
            drops on its own, as DeepSpeed does.
        split: over the hosts of an expert.
        transient_copies: on a rank, at most, of experts that it borrows for one step; with ``split="exact"``.
        least_copied: assignments that a copy must take over.

    Raises:
        ValueError: for a scope or split that does not exist, or copies without the exact split.
    """

    capacity_scope: CapacityScope = "pooled"
    split: Split = "exact"
    transient_copies: int = 0
    least_copied: int = 0

    def __post_init__(self) -> None:
        check_scope(self.capacity_scope)
        check_choice("split", self.split, get_args(Split))
        check_count("transient_copies", self.transient_copies, "'auto' or an integer, 0 or more", least=0)
        if self.transient_copies and self.split != "exact":
            raise ValueError(f"transient_copies={self.transient_copies} needs split='exact', got {self.split!r}")

    def caps_experts(self, capacity_factor: float | None) -> bool:
        """Whether an expert drops what is beyond the room of its own, as policies want to know."""
        return capacity_factor is not None and self.capacity_scope != "pooled"

    def share_out(self, counts: IntArray, placement: Placement, capacity_factor: float | None) -> Shares:
        """What every rank keeps and processes of ``counts[N, E]``.

        Without a capacity all is kept. Else:

        * ``"cluster"``: an expert keeps ``slot_capacity * replicas`` in all, whoever routed them.
        * ``"rank"``: every rank keeps ``ceil(capacity_factor * its assignments / E)`` of each expert, whatever its
          replicas; room that one rank leaves unused helps no other.
        * ``"pooled"``: a rank processes at most ``slot_capacity * s``; what it has no room for is missing from its
          experts in proportion, and from their sources in proportion.
        """
        if capacity_factor is None or self.capacity_scope != "pooled":
            kept = self._kept(counts, placement, capacity_factor)
            return Shares(kept, *self._spread(kept.sum(axis=0), placement))
        hosted, copied = self._spread(counts.sum(axis=0), placement)
        slot = slot_capacity(capacity_factor, int(counts.sum()), placement.table.size)
        within = keep_within_ranks(hosted, slot * placement.slots_per_rank)
        return Shares(keep_within_capacity(counts, within.sum(axis=0)), within, copied)

    def _spread(self, load: IntArray, placement: Placement) -> tuple[IntArray, NDArray[np.bool_] | None]:
        """``hosted`` and ``copied`` of ``Shares``."""
        if self.split == "even":
            return host_share(load, placement), None
        even = exact_split(load, placement)
        found = with_copies(even, placement, self.transient_copies, least_copied=self.least_copied)
        return found.hosted, found.copied if found.copied.any() else None

    def _kept(self, counts: IntArray, placement: Placement, capacity_factor: float | None) -> IntArray:
        if capacity_factor is None:
            return counts
        if self.capacity_scope == "cluster":
            slot = slot_capacity(capacity_factor, int(counts.sum()), placement.table.size)
            return keep_within_capacity(counts, slot * placement.replicas)
        limit = [slot_capacity(capacity_factor, int(routed), placement.num_experts) for routed in counts.sum(axis=1)]
        return np.minimum(counts, np.array(limit)[:, None])


def token_rule(capacity_scope: CapacityScope, split: Split, transient_copies: int | Literal["auto"]) -> TokenRule:
    """The rule of these options; without copies as long as ``with_chosen_copies`` has not chosen for ``"auto"``.

    Raises:
        ValueError: see ``TokenRule``.
    """
    if transient_copies != "auto":
        return TokenRule(capacity_scope, split, transient_copies)
    if split != "exact":
        raise ValueError(f"transient_copies='auto' needs split='exact', got {split!r}")
    return TokenRule(capacity_scope, split)


def with_chosen_copies(
    rule: TokenRule, clusters: Iterable[ClusterShape], obstacle: str | None = None
) -> tuple[TokenRule, str]:
    """What ``transient_copies="auto"`` comes to, and a line that says why.

    Args:
        rule: without copies.
        clusters: shapes of all layers.
        obstacle: why copies would cost too much here.
    """
    most = copies_worth_room(clusters)
    if obstacle is None and not most:
        obstacle = "every rank has a slot for every expert"
    if obstacle is not None:
        return rule, f"transient_copies='auto' is off: {obstacle}"
    what = "an expert" if most == 1 else f"up to {most} experts"
    line = f"transient_copies='auto': a rank may borrow {what}, for {LEAST_COPIED:,} assignments or more each"
    return replace(rule, transient_copies=most, least_copied=LEAST_COPIED), line
