"""Reading checkpoint files: data only, and only files that are what somebody wrote."""

from __future__ import annotations

import builtins
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lightning_swiftmoe.checkpoint.sums import KEY, changed_tensors
from lightning_swiftmoe.checkpoint.whole_file import is_unchanged


class CheckpointError(RuntimeError):
    """A checkpoint that is not loaded. Nothing was changed; on several ranks, every one of them raises."""


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file, always with ``weights_only=True``.

    Args:
        path: a file of ``torch.save``. One of ours must be as it was written; others are read as they are.
        map_location: as for ``torch.load``.

    Raises:
        CheckpointError: it is cut short, was changed, or holds more than data.
        OSError: the file system does not give it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    unchanged = is_unchanged(path)
    try:
        with safe_globals(data_classes()):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(_why_not(path, unchanged, error)) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint: choose another file")
    changed = changed_tensors(checkpoint)
    if unchanged is False:
        where = f": {first_of(changed)}" if changed else ", outside of its tensors"
        raise CheckpointError(f"{path} was damaged since it was written{where}; choose another checkpoint")
    if changed:
        raise CheckpointError(
            f"in {path} {listed(changed)} not what was saved: choose another checkpoint, or, if somebody changed it on "
            f"purpose, remove its key {KEY!r} and save it again"
        )
    return checkpoint


def why_unreadable(path: Path) -> str | None:
    """What ``read_checkpoint`` would refuse in a whole file of ``torch.save``; None: nothing. Reads no tensors."""
    try:
        with safe_globals(data_classes()):
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        return _what_it_holds(path, error)
    return None


def listed(names: Iterable[str]) -> str:
    """The first few names with "is" or "are"."""
    names = list(names)
    return f"{first_of(names)} {'is' if len(names) == 1 else 'are'}"


def first_of(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _why_not(path: Path, unchanged: bool | None, error: Exception) -> str:
    """In one sentence, what keeps a file from being read."""
    holds = _what_it_holds(path, error)
    if holds is None or unchanged is False:
        return f"{path} is no whole file of torch.save: it was cut short or damaged; choose another checkpoint"
    return (
        f"{path} holds {holds}, but only data is loaded (weights_only=True), whoever asks: save without it, or, if you "
        "know what it is and trust the file, allow it by torch.serialization.add_safe_globals"
    )


def _what_it_holds(path: Path, error: Exception) -> str | None:
    """What in a file torch refused with ``error`` as more than data; None where that was not the reason."""
    try:
        with safe_globals(data_classes()):
            unsafe = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return None
    if unsafe:
        return ", ".join(unsafe)
    said = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return f"what torch refuses ({said.group(1).rstrip('. ')})" if said else None


@cache
def data_classes() -> list[Any]:
    """What Lightning's users keep in hyper-parameters and callback states, beyond what torch allows: data only."""
    import omegaconf
    from omegaconf.base import ContainerMetadata, Metadata

    nodes = [cls for name, cls in vars(omegaconf).items() if name.endswith("Node") and name != "Node"]
    plain = [getattr(builtins, name) for name in ("dict", "list", "tuple", "int", "float", "bool", "str", "bytes")]
    dtypes = [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")]
    return [
        *(omegaconf.DictConfig, omegaconf.ListConfig, ContainerMetadata, Metadata, Any, defaultdict, *nodes, *plain),
        *(Path, PosixPath, PurePosixPath),
        *(np.ndarray, np.dtype, *dtypes, np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]),
    ]
