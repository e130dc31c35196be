"""Kills by the clock: what they cost a run, simulated and real.

``python -m tests.faults.preemptions`` prints what a day of kills costs with several periods of checkpoints, on a
simulated clock. ``... real minutes=60 every_s=300`` trains for so long, kills as it goes, and prints what that cost
beside what the simulated clock says of the run's own times. ``... read folder=FOLDER`` prints that again.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from tests.faults.preempted_run import KILLS, MARKS, SETTINGS, preempt
from tests.faults.preempted_times import Measured, measured
from tests.faults.preemption_clock import (
    Outcome,
    Times,
    best_period_s,
    outcome_of,
    poisson_kills,
    regular_kills,
    uneven_kills,
)
from tests.settings import settings_of

# Seconds are those of the quickstart on two cores: docs/results/faults.md.
SIMULATED = {"step_s": 0.23, "save_s": 0.118, "restart_s": 14.4, "every_s": 300.0, "hours": 24.0, "seed": 0}
REAL = {"minutes": 60.0, "every_s": 300.0, "every_n_steps": 20, "seed": 0, "folder": ""}
READ = {"folder": ""}
DEFAULT_STEPS = 1000  # of the command line
MOVED = 200  # times that each kill is put elsewhere in its round


def main(argv: list[str]) -> int:
    """One of the three, by the first word; 2 where it was asked wrongly."""
    what = argv[0] if argv and "=" not in argv[0] else "simulated"
    defaults = {"simulated": SIMULATED, "real": REAL, "read": READ}.get(what)
    if defaults is None:
        print(f"error: {what!r} is neither real nor read", file=sys.stderr)
        return 2
    try:
        options = settings_of(argv[what != "simulated" :], defaults)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if what == "simulated":
        simulate(**options)
        return 0
    folder = Path(options.pop("folder") or tempfile.mkdtemp(prefix="preemptions-")).absolute()
    if what == "real":
        print(f"trains in {folder}", flush=True)
        preempt(folder / "it", **options)
    compare(folder / "it" if (folder / "it").exists() else folder)
    return 0


def simulate(step_s: float, save_s: float, restart_s: float, every_s: float, hours: float, seed: int) -> None:
    """Print a row for each period and each kind of kills."""
    times, horizon_s = Times(step_s, save_s, restart_s), 3600 * hours
    best_s = best_period_s(save_s, every_s)
    best = max(1, round(best_s / step_s))
    print(f"a step {step_s} s, a save {save_s} s, a restart {restart_s} s; kills {every_s:g} s apart for {hours:g} h")
    print(f"the best period by Young's formula is {best_s:.1f} s of training, {best} steps\n")
    print("| steps between checkpoints | kills | steps kept | lost | of all steps | saving | restarting | time lost |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, kills in (
        ("regular", regular_kills(every_s, horizon_s)),
        ("uneven", uneven_kills(every_s, horizon_s, seed)),
        ("Poisson", poisson_kills(every_s, horizon_s, seed)),
    ):
        for period in sorted({max(1, best // 4), max(1, best // 2), best, 2 * best, 4 * best, DEFAULT_STEPS}):
            outcome = outcome_of(times, period, kills, horizon_s)
            name = f"**{period}**" if period == best else f"{period}"
            print(f"| {name} | {len(kills)} {kind} | {_row(outcome)} |")


def _row(outcome: Outcome) -> str:
    saving, restarting = outcome.saving_s / outcome.horizon_s, outcome.restarting_s / outcome.horizon_s
    return (
        f"{outcome.steps:,} | {outcome.steps_lost:,} | {outcome.lost_steps_share:.2%} | {saving:.2%} | "
        f"{restarting:.2%} | {outcome.lost_time_share:.2%}"
    )


def compare(folder: Path) -> None:
    """Print what a preempted run lost, beside the simulated clock with that run's own times and kills.

    The clock is asked ``MOVED`` times, with each kill elsewhere in its round: their mean, and what 90 % lie between.
    """
    settings = json.loads((folder / SETTINGS).read_text())
    kills = [float(line.split()[0]) for line in (folder / KILLS).read_text().splitlines()]
    marks = (folder / MARKS).read_text().splitlines()
    period = settings["every_n_steps"]
    # A run that somebody else ended has no such word; it ended with its last mark.
    run = measured(marks, kills, settings.get("ended", float(marks[-1].split()[2])), period)
    real, times = run.outcome, run.outcome.times
    print(f"{real.kills} kills, {settings['every_s']:g} s apart, in {real.horizon_s / 60:.1f} minutes")
    print(f"a step {times.step_s:.4f} s, a save {times.save_s:.4f} s every {period} steps")
    print(f"a restart {times.restart_s:.2f} s, from {min(run.restarts_s):.2f} to {max(run.restarts_s):.2f}\n")
    clock = outcome_of(times, period, run.kills, real.horizon_s)
    moved = moved_outcomes(run, period)
    print("| | real | simulated | differs by | 5 % | 95 % | with the very kills |\n|---|---|---|---|---|---|---|")
    for name, digits, value in (
        ("steps kept", 0, lambda outcome: outcome.steps),
        ("steps lost", 0, lambda outcome: outcome.steps_lost),
        ("steps lost, % of all", 2, lambda outcome: 100 * outcome.lost_steps_share),
        ("saving, s", 1, lambda outcome: outcome.saving_s),
        ("restarting, s", 1, lambda outcome: outcome.restarting_s),
        ("time lost, %", 2, lambda outcome: 100 * outcome.lost_time_share),
    ):
        others = sorted(map(value, moved))
        is_, says = value(real), fmean(others)
        low, high = others[len(others) // 20], others[-1 - len(others) // 20]
        cells = " | ".join(f"{number:,.{digits}f}" for number in (low, high, value(clock)))
        print(f"| {name} | {is_:,.{digits}f} | {says:,.{digits}f} | {says / is_ - 1:+.1%} | {cells} |")


def moved_outcomes(run: Measured, every_n_steps: int) -> list[Outcome]:
    """The simulated clock with each kill put anywhere in its round of steps and a save.

    Where in a round a kill comes, a clock of mean times cannot know; it decides what the kill takes.
    """
    rng = random.Random(0)
    times, horizon_s = run.outcome.times, run.outcome.horizon_s
    half_s = (every_n_steps * times.step_s + times.save_s) / 2
    outcomes = []
    for _ in range(MOVED):
        kills = sorted(min(max(kill + rng.uniform(-half_s, half_s), 0), horizon_s) for kill in run.kills)
        outcomes.append(outcome_of(times, every_n_steps, kills, horizon_s))
    return outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
