"""Who owns which part of an expert's parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvenShards:
    """One parameter ``[E, rows, ...]``: the rows of every expert are cut into ``N`` intervals that never move.

    Rank ``j`` owns rows ``j*chunk_rows .. (j+1)*chunk_rows`` of every expert; the last intervals may be short or empty.
    This is how ``torch.distributed.tensor.Shard(1)`` cuts. Flattened, the intervals are contiguous.

    Example: 5 rows over 4 ranks are cut 2, 2, 1, 0.

    Args:
        rows: of one expert.
        cols: elements of a row: columns of a matrix, 1 of a bias.
        num_ranks: ranks ``N``.
    """

    rows: int
    cols: int
    num_ranks: int

    @property
    def num_elements(self) -> int:
        """Elements ``P`` of one expert's parameter."""
        return self.rows * self.cols

    @property
    def chunk_rows(self) -> int:
        """Rows of a full shard, ``ceil(rows / N)``."""
        return -(-self.rows // self.num_ranks)

    @property
    def chunk(self) -> int:
        """Elements of a full shard of one expert."""
        return self.chunk_rows * self.cols

    def row_interval(self, rank: int) -> tuple[int, int]:
        """``(start, stop)`` of the rows that ``rank`` owns."""
        start = min(rank * self.chunk_rows, self.rows)
        return start, min(start + self.chunk_rows, self.rows)

    def interval(self, rank: int) -> tuple[int, int]:
        """``(start, stop)`` of the elements that ``rank`` owns of a flattened expert."""
        start, stop = self.row_interval(rank)
        return start * self.cols, stop * self.cols

    @property
    def bounds(self) -> tuple[int, ...]:
        """``N + 1`` numbers: rank ``j`` owns elements ``bounds[j] .. bounds[j + 1]`` of a flattened expert."""
        return tuple(min(rank * self.chunk, self.num_elements) for rank in range(self.num_ranks + 1))

    def size(self, rank: int) -> int:
        """Elements that ``rank`` owns of one expert."""
        start, stop = self.interval(rank)
        return stop - start
