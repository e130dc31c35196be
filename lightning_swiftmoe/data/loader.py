"""Windows of tokens, and a loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset[Tensor]):
    """Non-overlapping windows of ``seq_len + 1`` tokens: inputs, and targets shifted by one.

    Args:
        tokens: one-dimensional array.
        seq_len: tokens of one sequence.

    Raises:
        ValueError: fewer tokens than one window.
    """

    def __init__(self, tokens: NDArray[Any], seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        if len(self) < 1:
            raise ValueError(
                f"a split of {tokens.size} tokens has no window of {seq_len} + 1; choose a smaller seq_len"
            )

    def __len__(self) -> int:
        return max(0, (self.tokens.size - 1) // self.seq_len)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.seq_len
        return torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype("int32"))


class ResumableLoader(DataLoader[Any]):
    """A DataLoader with a position, which Lightning saves: resuming continues with the next batch of the epoch."""

    _taken = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        self._taken = skip
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                self._taken += 1
                yield batch
        self._taken = 0

    def state_dict(self) -> dict[str, int]:
        """Batches of this epoch that were handed out; none after the last, since Lightning never asks for one more."""
        return {"taken": self._taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next epoch's iteration behind these batches."""
        self._skip = state["taken"]
