"""Load traces: who routed how much to whom, on every step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lightning_swiftmoe.step import Step


class TraceWriter:
    """Collects ``counts[steps, layers, ranks, experts]`` and writes them as one ``.npz``.

    Beside them: ``replicas[steps, layers, experts]`` in force and ``rank_load[steps, layers, ranks]``, the assignments
    that each rank processed, after drops.

    Args:
        path: file to write; folders are made, an existing file is replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._steps: list[int] = []
        self._counts: list[np.ndarray] = []
        self._replicas: list[np.ndarray] = []
        self._rank_loads: list[np.ndarray] = []
        self._meta: dict[str, Any] = {}

    def add(self, number: int, step: Step) -> None:
        """Add one step. All layers must have the same number of experts.

        Raises:
            ValueError: they have not.
        """
        sizes = {layer.counts.shape for layer in step.layers}
        if len(sizes) != 1:
            raise ValueError(f"a trace needs layers of one shape, got counts of {sorted(sizes)}; train without trace=")
        self._steps.append(number)
        self._counts.append(np.stack([layer.counts for layer in step.layers]).astype(np.int32))
        self._replicas.append(np.stack([layer.placement.replicas for layer in step.layers]).astype(np.int16))
        self._rank_loads.append(np.stack([layer.rank_load for layer in step.layers]).astype(np.int32))
        self._meta = {
            "layers": [layer.name for layer in step.layers],
            "top_k": step.layers[0].top_k,
            "tokens_per_rank": step.layers[0].num_tokens / step.layers[0].counts.shape[0],
            "slots_per_rank": step.layers[0].placement.slots_per_rank,
        }

    def write(self) -> None:
        """Write what was added so far, in one piece: a reader never sees half a file."""
        if not self._steps:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                counts=np.stack(self._counts),
                replicas=np.stack(self._replicas),
                rank_load=np.stack(self._rank_loads),
                steps=np.array(self._steps),
                meta=np.array(json.dumps(self._meta)),
            )
        partial.replace(self.path)
