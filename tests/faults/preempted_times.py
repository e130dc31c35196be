"""What a run whose processes were killed by the clock took and lost, from what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from tests.faults.preemption_clock import Outcome, Times


@dataclass(frozen=True)
class Measured:
    """A run that was preempted.

    Args:
        outcome: with mean times of this run. Its time begins with the first step.
        kills: seconds of that time.
        restarts_s: of each restart, in order: from the kill to the beginning of the first step behind it.
    """

    outcome: Outcome
    kills: list[float]
    restarts_s: list[float]


def measured(marks: Sequence[str], kills: Sequence[float], ended: float, every_n_steps: int) -> Measured:
    """Read what ``Marks`` wrote.

    A step lasts from the end of the one before it. Steps behind a checkpoint last longer by the time of saving; the
    first behind a start is left out of the mean, and its extra time counts for the restart.

    Args:
        marks: lines ``start STEP SECONDS`` and ``step STEP SECONDS``.
        kills: seconds on the same clock.
        ended: the end, on the same clock.
        every_n_steps: between checkpoints.

    Raises:
        ValueError: too few steps to know the times, or steps that do not add up.
    """
    attempts: list[list[tuple[int, float]]] = []
    lost = 0
    for mark in marks:
        what, step, when = mark.split()
        if what == "start":
            lost += (_steps(attempts) - int(step)) if attempts else 0
            attempts.append([])
        elif float(when) <= ended:
            attempts[-1].append((int(step), float(when)))
    plain, saving = [], []
    for attempt in attempts:
        for (before, began), (_, at) in pairwise(attempt):
            (plain if before % every_n_steps else saving).append(at - began)
    if not plain or not saving:
        raise ValueError(f"{len(plain)} steps, and {len(saving)} behind a checkpoint: too few to know their times")
    step_s = fmean(plain)
    save_s = max(fmean(saving) - step_s, 0.0)
    steps, taken = _steps(attempts), sum(map(len, attempts))
    if steps + lost != taken:
        raise ValueError(f"{taken} steps were taken, but {steps} were kept and {lost} lost")
    zero = attempts[0][0][1] - step_s
    firsts = [attempt[0][1] - step_s for attempt in attempts[1:] if attempt]
    restarts_s = [first - max(kill for kill in kills if kill < first) for first in firsts]
    times = Times(step_s, save_s, fmean(restarts_s) if restarts_s else 0.0)
    horizon_s = ended - zero
    saving_s = len(saving) * save_s
    restarting_s = sum(restarts_s)
    cut_s = horizon_s - taken * step_s - saving_s - restarting_s
    outcome = Outcome(times, horizon_s, len(kills), steps, lost, saving_s, restarting_s, cut_s)
    return Measured(outcome, [kill - zero for kill in kills], restarts_s)


def _steps(attempts: Sequence[Sequence[tuple[int, float]]]) -> int:
    """That the run has, by the newest attempt that took any."""
    return next((attempt[-1][0] for attempt in reversed(attempts) if attempt), 0)
