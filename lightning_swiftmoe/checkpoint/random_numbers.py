"""Where the random numbers of a rank stand: PyTorch's on the host and on the rank's GPU, NumPy's and Python's.

A checkpoint keeps those of every rank. A run that goes on with as many ranks draws what it would have drawn.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def current_state(device: torch.device) -> dict[str, Any]:
    """Of this process, as tensors and plain values.

    Args:
        device: of this rank; another GPU's numbers are none of its.
    """
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 that which libraries draw from
    assert isinstance(key, np.ndarray)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(key.astype(np.int64)), position, has_gauss, cached),
        "python": (version, torch.tensor(words), gauss),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def put_back(state: dict[str, Any], device: torch.device) -> None:
    """Go on from ``state``. What it has of a GPU counts where this rank has one."""
    torch.set_rng_state(state["torch"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class GoingOn:
    """Puts back the numbers of a checkpoint where a run that goes on has come to the place at which it was saved.

    Loaders draw numbers too, when they begin an epoch. Lightning makes them begin while it sets up (2.6.6), which a run
    that was saved in the middle of an epoch did long before, and one that was saved behind an epoch had still to do.

    Args:
        state: of this rank, from ``current_state``.
        device: of this rank.
    """

    def __init__(self, state: dict[str, Any], device: torch.device) -> None:
        self._saved = state
        self._device = device
        self._behind_loaders: dict[str, Any] | None = None

    def before_loaders(self) -> None:
        """Loaders are about to begin: those of a new epoch draw its order from the saved numbers."""
        put_back(self._saved, self._device)

    def behind_loaders(self) -> None:
        """Loaders have begun, and training starts: in the middle of an epoch, with the saved numbers."""
        self._behind_loaders = current_state(self._device)
        put_back(self._saved, self._device)

    def loaders_begin_again(self) -> None:
        """For a new epoch, after whatever came between: from here on nothing is as when it was saved."""
        self._behind_loaders = None

    def epoch_begins(self) -> None:
        """The first batch of an epoch comes from the loaders that began while Lightning set up."""
        if self._behind_loaders is not None:
            put_back(self._behind_loaders, self._device)
