"""Who owns which interval of an expert's parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvenShards:
    """One parameter of every expert, flattened and cut into ``N`` intervals that never move.

    Rank ``j`` owns elements ``j*chunk .. (j+1)*chunk`` of every expert; the last intervals may be short or empty.
    Shards are stored ``[E, chunk]`` with zeros behind the end, so that all ranks hold the same shape.

    Args:
        num_elements: elements ``P`` of one expert's parameter.
        num_ranks: ranks ``N``.
    """

    num_elements: int
    num_ranks: int

    @property
    def chunk(self) -> int:
        """Elements of one shard, ``ceil(P / N)``."""
        return -(-self.num_elements // self.num_ranks)

    @property
    def padded(self) -> int:
        """Elements of all shards together, ``N * chunk >= P``."""
        return self.chunk * self.num_ranks

    def interval(self, rank: int) -> tuple[int, int]:
        """``(start, stop)`` of the elements that ``rank`` owns."""
        start = min(rank * self.chunk, self.num_elements)
        return start, min(start + self.chunk, self.num_elements)
