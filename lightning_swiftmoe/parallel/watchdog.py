"""Ends this process when an exchange on the device does not: its launch succeeds whatever the other ranks do.

A rank whose peer is gone waits for it inside a kernel, where no exception reaches. A thread looks at the oldest
exchange once a second; a step only appends to a queue.

Whatever that thread calls must not wait for the device. Asking an event does not; destroying one does, in the driver
and with Python's lock in hand, while another thread waits for a copy. So those who start exchanges destroy events.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

EXIT_CODE = 75  # "temporary failure" of sysexits.h: resuming from a checkpoint may work

_PERIOD_S = 1.0


class Passable(Protocol):
    """A ``torch.cuda.Event`` that has been recorded, or what looks like one."""

    def query(self) -> bool:
        """Whether it has passed."""
        ...


@dataclass(frozen=True)
class Exchange:
    """One that was started.

    Args:
        phase: of the step.
        layer: whose.
        done: recorded behind it.
        started_at: by the watchdog's clock.
    """

    phase: str
    layer: str
    done: Passable
    started_at: float


class Watchdog:
    """Watches the exchanges of one rank, from ``start`` to ``close``.

    Args:
        timeout_s: an exchange that takes longer ends the process.
        rank: this one.
        num_ranks: of the job.
        end: called with one line; ends the process.
        clock: in seconds.
    """

    def __init__(
        self,
        timeout_s: float,
        rank: int,
        num_ranks: int,
        end: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # torch watches NCCL too, and says less: speak first.
        self._limit_s = max(timeout_s - 2 * _PERIOD_S, timeout_s / 2)
        self._where = f"on rank {rank} of {num_ranks}"
        self._end = end or end_process
        self._clock = clock
        self._running: deque[Exchange] = deque()
        self._passed: deque[Exchange] = deque()
        self._closed = threading.Event()

    def watch(self, phase: str, layer: str, done: Passable) -> None:
        """An exchange was started and ``done`` recorded behind it."""
        self._passed.clear()
        self._running.append(Exchange(phase, layer, done, self._clock()))

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._look, name="swiftmoe-watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()

    def look(self) -> None:
        """Set aside what has passed, and end the process where the oldest of the rest is too old."""
        if self._closed.is_set():
            return
        while self._running and self._running[0].done.query():
            self._passed.append(self._running.popleft())
        if not self._running:
            return
        oldest = self._running[0]
        age = self._clock() - oldest.started_at
        if age >= self._limit_s:
            self._end(
                f"{oldest.phase} exchange of layer {oldest.layer!r} {self._where} has not finished for {age:.0f} s: "
                "another rank ended, is stuck, or takes part in fewer exchanges. This process ends"
            )

    def _look(self) -> None:
        while not self._closed.wait(_PERIOD_S):
            self.look()


def end_process(line: str, tell: Callable[[str], None] | None = None) -> None:
    """Say ``line`` and end. Nothing else runs: whatever touches the device would wait as well.

    Args:
        line: what to say.
        tell: is called with it, for others that want to know.
    """
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        if tell is not None:
            tell(line)
    finally:
        os._exit(EXIT_CODE)
