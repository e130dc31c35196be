"""What a process holds, and whether it comes to hold more and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

WARM_UP = 0.1  # of the samples: buffers of first steps, modules imported late, arenas of malloc


@dataclass(frozen=True)
class Usage:
    """Of one process at one time.

    Args:
        rss_bytes: resident memory.
        files: open file descriptors, sockets among them.
        threads: of the kernel, whoever started them.
    """

    rss_bytes: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Usage:
        """Of this process."""
        process = psutil.Process()
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


def settled(samples: Sequence[Usage]) -> Sequence[Usage]:
    """Without the warm-up, which is at least the first sample."""
    return samples[max(1, int(WARM_UP * len(samples))) :]


def growth(values: Sequence[float]) -> float:
    """By how much a least-squares line through equidistant ``values`` rises from end to end, as a part of its start.

    Raises:
        ValueError: fewer than two values, through which no line goes.
    """
    if len(values) < 2:
        raise ValueError(f"a line needs two values, got {len(values)}")
    where = np.arange(len(values))
    slope, start = np.polyfit(where, np.asarray(values, dtype=float), 1)
    return float(slope * where[-1] / start)


def faults_of(samples: Sequence[Usage], most_growth: float) -> list[str]:
    """What grew behind the warm-up; empty where nothing did.

    Args:
        samples: equidistant in steps or in fits, at least three.
        most_growth: of resident memory, as a part of it. Files and threads must not change at all.
    """
    kept = settled(samples)
    faults = []
    if (rise := growth([usage.rss_bytes for usage in kept])) > most_growth:
        faults.append(f"resident memory grew by {rise:.2%}, more than {most_growth:.2%}")
    for name in ("files", "threads"):
        first, last = getattr(kept[0], name), getattr(kept[-1], name)
        if first != last:
            faults.append(f"{first} {name} became {last}")
    return faults
