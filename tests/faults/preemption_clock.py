"""What kills cost a run, on a simulated clock: no training, no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """What a run takes.

    Args:
        step_s: seconds of a step.
        save_s: seconds for which a checkpoint holds training up.
        restart_s: seconds from a kill to the beginning of the first step behind the newest checkpoint.
    """

    step_s: float
    save_s: float
    restart_s: float

    def __post_init__(self) -> None:
        if not self.step_s > 0 or self.save_s < 0 or self.restart_s < 0:
            raise ValueError(f"a step must take time, and nothing less than none: {self}")


@dataclass(frozen=True)
class Outcome:
    """What became of a run. All ``_s`` but ``horizon_s`` and the steps' own seconds add up to ``horizon_s``.

    Args:
        times: of the run.
        horizon_s: seconds from the beginning of the first step to the end.
        kills: how many.
        steps: that the run has at the end.
        steps_lost: that it had done and lost, and must do again.
        saving_s: seconds of saving; also of checkpoints that a kill cut short.
        restarting_s: seconds without training behind kills.
        cut_s: seconds of steps that a kill, or the end, cut short.
    """

    times: Times
    horizon_s: float
    kills: int
    steps: int
    steps_lost: int
    saving_s: float
    restarting_s: float
    cut_s: float

    @property
    def lost_steps_share(self) -> float:
        """Steps that were lost, of all that were taken."""
        taken = self.steps + self.steps_lost
        return self.steps_lost / taken if taken else 0.0

    @property
    def lost_time_share(self) -> float:
        """Time that is not in a step which the run has at the end."""
        return 1 - self.steps * self.times.step_s / self.horizon_s


def outcome_of(times: Times, every_n_steps: int, kills: Sequence[float], horizon_s: float) -> Outcome:
    """Run until ``horizon_s``; each kill takes away all steps behind the newest whole checkpoint.

    The first step begins at 0. A checkpoint counts once it is whole, ``save_s`` after its last step. A kill on the way
    back starts the way back again.

    Args:
        times: of the run.
        every_n_steps: between checkpoints.
        kills: seconds, rising, each in 0 .. ``horizon_s``.
        horizon_s: the end, in seconds.

    Raises:
        ValueError: no period, or kills that do not rise or lie elsewhere.
    """
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps must be positive, got {every_n_steps}")
    if list(kills) != sorted(kills) or any(not 0 <= kill <= horizon_s for kill in kills):
        raise ValueError(f"kills must rise within 0 .. {horizon_s} s")
    saved = lost = left = 0
    saving_s = restarting_s = cut_s = 0.0
    trains_from = 0.0
    for number, end in enumerate([*kills, horizon_s]):
        is_kill = number < len(kills)
        if end < trains_from:  # still on the way back
            restarting_s -= trains_from - end
        else:
            whole, left, saving, cut = _stretch(times, every_n_steps, end - trains_from)
            saved += whole
            saving_s += saving
            cut_s += cut
            lost += left if is_kill else 0
        if is_kill:
            left = 0
            restarting_s += times.restart_s
            trains_from = end + times.restart_s
    return Outcome(times, horizon_s, len(kills), saved + left, lost, saving_s, restarting_s, cut_s)


def _stretch(times: Times, every_n_steps: int, seconds: float) -> tuple[int, int, float, float]:
    """Of training without a kill: steps saved, steps behind them, seconds of saving, and of a step cut short."""
    round_s = every_n_steps * times.step_s + times.save_s
    rounds = int(seconds // round_s)
    rest_s = seconds - rounds * round_s
    left = min(int(rest_s // times.step_s), every_n_steps)
    over_s = rest_s - left * times.step_s
    saves = left == every_n_steps
    saving_s = rounds * times.save_s + (over_s if saves else 0.0)
    return rounds * every_n_steps, left, saving_s, 0.0 if saves else over_s


def regular_kills(every_s: float, horizon_s: float) -> list[float]:
    """Seconds of kills at ``every_s``, twice ``every_s`` and so on, before ``horizon_s``."""
    return [number * every_s for number in range(1, math.ceil(horizon_s / every_s))]


def uneven_kills(every_s: float, horizon_s: float, seed: int) -> list[float]:
    """Regular kills, each up to 5 % of ``every_s`` early or late.

    Regular ones meet a run of constant times at the same place of a round each time, and say nothing of other places.
    """
    rng = random.Random(seed)
    kills = [kill + rng.uniform(-0.05, 0.05) * every_s for kill in regular_kills(every_s, horizon_s)]
    return [kill for kill in kills if kill < horizon_s]


def poisson_kills(mean_s: float, horizon_s: float, seed: int) -> list[float]:
    """Seconds of kills that know nothing of each other, ``mean_s`` apart on average."""
    rng = random.Random(seed)
    kills = [rng.expovariate(1 / mean_s)]
    while kills[-1] < horizon_s:
        kills.append(kills[-1] + rng.expovariate(1 / mean_s))
    return kills[:-1]


def best_period_s(save_s: float, mean_s: float) -> float:
    """Seconds of training between checkpoints that cost least, to first order, with kills ``mean_s`` apart.

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
    """
    return math.sqrt(2 * save_s * mean_s)
