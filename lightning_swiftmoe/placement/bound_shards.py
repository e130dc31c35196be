"""Optimizer state bound to the hosts of an expert, as static and FlexMoE keep it (our baselines)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lightning_swiftmoe.placement.placement import Placement


class Piece(NamedTuple):
    """Elements ``start .. stop`` of ``expert``; in the flat shard of their owner they begin at ``offset``."""

    expert: int
    start: int
    stop: int
    offset: int

    @property
    def num_elements(self) -> int:
        """How many elements."""
        return self.stop - self.start

    @property
    def here(self) -> slice:
        """Where they are in the owner's shard."""
        return slice(self.offset, self.offset + self.num_elements)


@dataclass(frozen=True)
class BoundShards:
    """One parameter of every expert, flattened; expert ``e`` is cut into as many intervals as it has hosts.

    The ``i``-th host (ascending) owns elements ``i*chunk .. (i+1)*chunk`` with ``chunk = ceil(P / hosts)``; the last
    intervals may be short or empty. When the placement changes the hosts change, and so do the owners: state moves.

    Args:
        num_elements: elements ``P`` of one expert's parameter.
        placement: whose hosts own the state.
    """

    num_elements: int
    placement: Placement

    @property
    def num_experts(self) -> int:
        """Experts ``E``."""
        return self.placement.num_experts

    def intervals(self, expert: int) -> list[tuple[int, int, int]]:
        """``(rank, start, stop)`` of every owner of ``expert``, in order of the elements; empty intervals left out.

        Example: 10 elements of an expert on ranks 1, 4 and 5 are owned as ``(1, 0, 4), (4, 4, 8), (5, 8, 10)``.
        """
        hosts = self.placement.hosts(expert).tolist()
        return cut_evenly(self.num_elements, hosts)

    def pieces(self, rank: int) -> dict[int, Piece]:
        """What ``rank`` owns by expert, ascending: its shard is these elements one after the other.

        Example: rank 4 owns ``4 .. 8`` of expert 1 and ``0 .. 5`` of expert 3: pieces ``(1, 4, 8, 0)`` and
        ``(3, 0, 5, 4)``.
        """
        return self._pieces[rank]

    def size(self, rank: int) -> int:
        """Elements of ``rank``'s shard. They differ between ranks; zero where experts have more hosts than elements."""
        return sum(piece.num_elements for piece in self.pieces(rank).values())

    @cached_property
    def _pieces(self) -> list[dict[int, Piece]]:
        pieces: list[dict[int, Piece]] = [{} for _ in range(self.placement.num_ranks)]
        sizes = [0] * self.placement.num_ranks
        for expert in range(self.num_experts):
            for rank, start, stop in self.intervals(expert):
                pieces[rank][expert] = Piece(expert, start, stop, sizes[rank])
                sizes[rank] += stop - start
        return pieces


def cut_evenly(num_elements: int, owners: list[int]) -> list[tuple[int, int, int]]:
    """``(owner, start, stop)`` when every owner takes ``ceil(P / owners)`` elements in turn, as far as they last."""
    chunk = -(-num_elements // len(owners))
    starts = range(0, num_elements, chunk)
    return [(owner, start, min(start + chunk, num_elements)) for owner, start in zip(owners, starts, strict=False)]
