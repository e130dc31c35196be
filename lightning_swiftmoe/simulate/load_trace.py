"""Load traces: how many assignments each rank routed to each expert of each layer, on every step."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.arguments import check_count
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.trace_file import read_trace


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """Assignments before drops, validated.

    Args:
        counts: ``[steps, layers, ranks, experts]`` integers. With one rank only the global loads are known, and a
            simulation spreads them evenly over the ranks they come from.
        steps: ``[steps]`` ascending step numbers.
        top_k: assignments per token.
        name: where it comes from.

    Raises:
        ValueError: a wrong shape, values that are no counts, or a step and layer in which nothing was routed.
    """

    counts: NDArray[np.integer]
    steps: IntArray
    top_k: int
    name: str = "trace"

    def __post_init__(self) -> None:
        counts, steps = np.asarray(self.counts), np.asarray(self.steps)
        if counts.ndim != 4 or 0 in counts.shape:
            raise ValueError(
                f"{self.name}: counts must be [steps, layers, ranks, experts], got shape {counts.shape}; a single "
                "layer or rank still needs its dimension"
            )
        if not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"{self.name}: counts must be integers, got {counts.dtype}; save assignments, not shares")
        if steps.shape != counts.shape[:1] or (np.diff(steps) <= 0).any():
            raise ValueError(
                f"{self.name}: steps must be {counts.shape[0]} ascending numbers, one per step of counts, got shape "
                f"{steps.shape}"
            )
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"{self.name}: top_k must be a positive integer, got {self.top_k!r}; correct it in meta")
        self._check_values(counts)

    def _check_values(self, counts: NDArray) -> None:
        if counts.min() < 0:
            where = tuple(int(i) for i in np.argwhere(counts < 0)[0])
            raise ValueError(
                f"{self.name}: counts must not be negative, got {counts[where]} at [step, layer, rank, expert] {where}"
            )
        empty = np.argwhere(counts.sum(axis=(2, 3), dtype=np.int64) == 0)
        if empty.size:
            step, layer = empty[0]
            raise ValueError(
                f"{self.name}: counts are all zero in {len(empty)} of {counts.shape[0] * counts.shape[1]} steps and "
                f"layers, first at step {int(np.asarray(self.steps)[step])}, layer {layer}; leave such steps out"
            )

    @property
    def num_steps(self) -> int:
        """Steps recorded."""
        return self.counts.shape[0]

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.counts.shape[1]

    @property
    def num_ranks(self) -> int:
        """Ranks that routed; 1 when only global loads are known."""
        return self.counts.shape[2]

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.counts.shape[3]

    def loads(self, step: int, layer: int) -> IntArray:
        """``[E]`` assignments of all ranks."""
        return self.counts[step, layer].sum(axis=0, dtype=np.int64)

    def first(self, num_steps: int | None) -> LoadTrace:
        """The first steps only; all of them with None.

        Raises:
            ValueError: no positive integer. A negative one would cut the trace at its other end.
        """
        if num_steps is not None:
            check_count("num_steps", num_steps, "None (all) or a positive integer")
        return LoadTrace(self.counts[:num_steps], self.steps[:num_steps], self.top_k, self.name)

    def spread(self, num_ranks: int) -> LoadTrace:
        """The same shares of load on another number of ranks, each routing as many assignments as a rank did.

        Sources are spread evenly from then on. Loads are rounded to integers.
        """
        loads = self.counts.sum(axis=2, keepdims=True, dtype=np.int64)
        return LoadTrace(loads * num_ranks // self.num_ranks, self.steps, self.top_k, self.name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as ``.npz`` with the arrays that ``load_trace`` needs."""
        meta = {"top_k": self.top_k, "source": self.name, "tokens_per_rank": self._tokens_per_rank()}
        np.savez_compressed(path, counts=self.counts, steps=self.steps, meta=np.array(json.dumps(meta)))

    def _tokens_per_rank(self) -> float:
        return float(self.counts[0, 0].sum(dtype=np.int64)) / self.num_ranks / self.top_k


def load_trace(path: str | os.PathLike[str]) -> LoadTrace:
    """Read ``counts``, ``steps`` and ``top_k`` of a trace, also of a run that goes on; more is not looked at.

    Raises:
        ValueError: what ``read_trace`` or ``LoadTrace`` refuses, or a ``meta`` that is no JSON object.
    """
    path = Path(path)
    arrays = read_trace(path)
    return LoadTrace(arrays["counts"], arrays["steps"], _meta(arrays["meta"], path).get("top_k", 1), path.name)


def _meta(text: NDArray, path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(str(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: meta must be a JSON string, got {str(text)[:60]!r}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: meta must be a JSON object, got {meta!r}")
    return meta
