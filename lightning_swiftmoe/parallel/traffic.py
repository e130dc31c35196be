"""What one rank moved, counted by phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PHASES = (
    *("load", "transient_copies", "dispatch", "combine", "gradient", "migration", "weight"),
    *("copies", "setup", "checkpoint"),
)


@dataclass
class Traffic:
    """What one rank moved in one phase.

    Args:
        sent_bytes: bytes sent to other ranks.
        seconds: on a CPU the time this process waited for the exchanges, on a GPU the time they took on their stream.
    """

    sent_bytes: int = 0
    seconds: float = 0.0


class TrafficMeter:
    """Adds up the traffic of all communicators of a rank."""

    def __init__(self) -> None:
        self._traffic = {phase: Traffic() for phase in PHASES}
        self._running: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._unknown: set[str] = set()

    def leave_out(self, *phases: str) -> None:
        """Say nothing of these: what nobody counts is not zero."""
        self._unknown.update(phases)

    def add(self, phase: str, sent_bytes: int = 0, seconds: float = 0.0) -> None:
        """Count bytes or time of ``phase``, one of ``PHASES``."""
        self._traffic[phase].sent_bytes += sent_bytes
        self._traffic[phase].seconds += seconds

    def add_events(self, phase: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Count the time between two recorded events, once both have passed."""
        self._running.append((phase, start, end))

    def pop(self) -> dict[str, Traffic]:
        """Traffic by phase since the last call, without what was left out.

        Never waits: exchanges still running count in a later call.
        """
        running = []
        for phase, start, end in self._running:
            if end.query():
                self._traffic[phase].seconds += start.elapsed_time(end) / 1e3
            else:
                running.append((phase, start, end))
        self._running = running
        traffic, self._traffic = self._traffic, {phase: Traffic() for phase in PHASES}
        return {phase: moved for phase, moved in traffic.items() if phase not in self._unknown}
