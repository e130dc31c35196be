"""Load traces: who routed how much to whom, on every step."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.step import LayerStep, Step
from lightning_swiftmoe.trace_file import SUFFIX, TraceFile

# What is lost at most when this process is killed, and what is in memory at most.
MOST_STEPS = 64
MOST_S = 5.0


class TraceWriter:
    """Appends every step to a file that ``read_trace`` reads at any time: ``lightning_swiftmoe.trace_file``.

    A run from the start replaces the file. One that resumes from a checkpoint continues it: later steps of the run that
    was interrupted are cut off first. With other layers, ranks, experts or slots than before, a new file begins and the
    old one stays beside it as ``NAME.until-STEP.npy.gz``.

    Args:
        path: file to write, ``*.npy.gz``; folders are made.

    Raises:
        ValueError: another suffix.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path).endswith(SUFFIX):
            raise ValueError(f"trace must be a file named *{SUFFIX}, got {os.fspath(path)!r}; read_trace reads it")
        self.path = Path(path)
        self._file = TraceFile(self.path)
        self._steps: dict[str, list[Any]] = {}
        self._meta: dict[str, Any] = {}
        self._written_at = monotonic()
        self._warned = False

    def check(self) -> None:
        """Make sure, before training, that the file can be written.

        Raises:
            OSError: it cannot.
        """
        self._file.check()

    def begin(self, last_step: int) -> None:
        """Training starts.

        Args:
            last_step: of the checkpoint; 0 starts anew.

        Raises:
            OSError: the file cannot be read or cut.
            ValueError: there is something else at its place.
        """
        self._file = TraceFile(self.path)
        self._steps = {}
        self._written_at = monotonic()
        if last_step > 0 and self.path.exists():
            self._file.resume(last_step)

    def add(self, number: int, step: Step) -> None:
        """Add one step, whose layers all have the same number of experts."""
        values = {
            "steps": number,
            "counts": np.stack([layer.counts for layer in step.layers]).astype(np.int32),
            "replicas": np.stack([layer.placement.replicas for layer in step.layers]).astype(np.int16),
            "rank_load": np.stack([layer.rank_load for layer in step.layers]).astype(np.int32),
        }
        for name, value in values.items():
            self._steps.setdefault(name, []).append(value)
        self._meta = _meta(step.layers)
        if len(self._steps["steps"]) >= MOST_STEPS or monotonic() - self._written_at >= MOST_S:
            self.flush()

    def flush(self) -> None:
        """Write what was added since last time. Where that fails, those steps are lost, which is told once."""
        if not self._steps:
            return
        arrays = {name: np.stack(values) for name, values in self._steps.items()}
        self._steps = {}
        self._written_at = monotonic()
        try:
            self._file.append(self._meta, arrays)
        except OSError as error:
            self._warn(arrays["steps"], error)

    def _warn(self, steps: NDArray[np.integer], error: OSError) -> None:
        if not self._warned:
            warnings.warn(
                f"steps {steps[0]} to {steps[-1]} are missing in trace={self.path}: {error}. Training goes on, and the "
                "steps to come are written if that is possible again: free space, or correct permissions",
                stacklevel=2,
            )
        self._warned = True


def _meta(layers: tuple[LayerStep, ...]) -> dict[str, Any]:
    num_ranks, num_experts = layers[0].counts.shape
    return {
        "layers": [layer.name for layer in layers],
        "ranks": num_ranks,
        "experts": num_experts,
        "top_k": layers[0].top_k,
        "tokens_per_rank": layers[0].num_tokens / num_ranks,
        "slots_per_rank": layers[0].placement.slots_per_rank,
    }
