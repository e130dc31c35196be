"""The simulated clock of preemptions: by hand, and by what must add up. Times are binary fractions: sums are exact."""

import random

import pytest

from tests.faults.preempted_times import measured
from tests.faults.preemption_clock import Times, best_period_s, outcome_of, poisson_kills, regular_kills, uneven_kills

TIMES = Times(step_s=1, save_s=0.5, restart_s=8)


def test_without_a_kill():
    """Rounds of 4 steps and a save are 4.5 s: two of them, and 1 s."""
    outcome = outcome_of(TIMES, 4, [], 10)
    assert (outcome.steps, outcome.steps_lost, outcome.saving_s, outcome.restarting_s, outcome.cut_s) == (9, 0, 1, 0, 0)
    assert outcome.lost_time_share == pytest.approx(0.1)


def test_a_kill_takes_what_is_not_saved():
    """At 7.75: 4 steps saved, 3 lost, 0.25 s of another. Back at 15.75, and 4.25 s are 4 steps and a part of a save."""
    outcome = outcome_of(TIMES, 4, [7.75], 20)
    assert (outcome.steps, outcome.steps_lost) == (8, 3)
    assert (outcome.saving_s, outcome.restarting_s, outcome.cut_s) == (0.75, 8, 0.25)
    assert outcome.lost_steps_share == 3 / 11
    assert outcome.lost_time_share == pytest.approx(12 / 20)


@pytest.mark.parametrize(("kill", "lost"), [(4.25, 4), (4.5, 0), (4, 4), (0, 0), (3.75, 3)])
def test_a_checkpoint_counts_once_it_is_whole(kill, lost):
    assert outcome_of(TIMES, 4, [kill], 20).steps_lost == lost


def test_a_kill_on_the_way_back():
    """Killed at 2, and at 6 before anything ran; back at 14, and 2 s are 2 steps."""
    outcome = outcome_of(TIMES, 4, [2, 6], 16)
    assert (outcome.steps, outcome.steps_lost, outcome.restarting_s) == (2, 2, 12)


def test_it_ends_on_the_way_back():
    outcome = outcome_of(TIMES, 4, [6], 10)
    assert (outcome.steps, outcome.steps_lost, outcome.restarting_s, outcome.cut_s) == (4, 1, 4, 0.5)


def by_the_step(times, every_n_steps, kills, horizon_s):
    """Steps and steps lost, one after the other instead of in rounds, and what ``Marks`` would have written."""
    now, step, saved, lost, kills = 0.0, 0, 0, 0, [*kills]
    marks = ["start 0 0"]
    while True:
        saves = step > saved and step % every_n_steps == 0
        after = now + (times.save_s if saves else times.step_s)
        end = min([horizon_s, *kills])
        if after <= end:
            now = after
            saved, step = (step, step) if saves else (saved, step + 1)
            marks += [] if saves else [f"step {step} {now}"]
        elif end == horizon_s:
            return step, lost, marks
        else:
            kills = kills[1:]
            lost, step, now = lost + step - saved, saved, end + times.restart_s
            while kills and kills[0] < now:
                now = kills.pop(0) + times.restart_s
            marks += [f"start {saved} {now}"] if now < horizon_s else []


@pytest.mark.parametrize("seed", range(20))
def test_rounds_are_steps_and_time_adds_up(seed):
    rng = random.Random(seed)
    times = Times(rng.randint(1, 8) / 8, rng.randint(0, 16) / 8, rng.randint(0, 80) / 8)
    kills = sorted(rng.randint(0, 8000) / 16 for _ in range(rng.randint(0, 30)))
    period = rng.randint(1, 40)
    outcome = outcome_of(times, period, kills, 500)
    assert (outcome.steps, outcome.steps_lost) == by_the_step(times, period, kills, 500)[:2]
    of_steps = (outcome.steps + outcome.steps_lost) * times.step_s
    assert of_steps + outcome.saving_s + outcome.restarting_s + outcome.cut_s == 500


def test_a_run_is_read_from_its_marks():
    """Without kills on the way back: a run that was killed there once cannot tell how long the way is."""
    times, kills = Times(0.25, 0.125, 9), regular_kills(61, 500)
    run = measured(by_the_step(times, 10, kills, 500)[2], kills, 500, 10)
    expected = outcome_of(times, 10, kills, 500)
    assert run.outcome.times == times
    assert run.kills == kills
    assert run.restarts_s == [9] * len(kills)
    assert (run.outcome.steps, run.outcome.steps_lost) == (expected.steps, expected.steps_lost)
    assert run.outcome.restarting_s == expected.restarting_s
    # Marks do not tell a save that a kill cut short from a step.
    assert run.outcome.saving_s + run.outcome.cut_s == expected.saving_s + expected.cut_s


def test_a_run_without_enough_steps():
    with pytest.raises(ValueError, match="too few to know their times"):
        measured(["start 0 0", "step 1 1"], [], 2, 10)


def test_steps_that_are_missing():
    marks = ["start 0 0", "step 1 1", "step 2 2", "step 3 4", "step 5 5"]
    with pytest.raises(ValueError, match="4 steps were taken, but 5 were kept and 0 lost"):
        measured(marks, [], 6, 2)


def test_kills():
    assert regular_kills(300, 900) == [300, 600]
    assert regular_kills(300, 901) == [300, 600, 900]
    early_or_late = [kill - even for kill, even in zip(uneven_kills(20, 1000, 0), regular_kills(20, 1000), strict=True)]
    assert -1 <= min(early_or_late) < -0.8
    assert 0.8 < max(early_or_late) <= 1
    kills = poisson_kills(10, 100_000, seed=0)
    assert kills == poisson_kills(10, 100_000, seed=0) != poisson_kills(10, 100_000, seed=1)
    assert len(kills) == pytest.approx(10_000, rel=0.03)  # three times the deviation, 1 %


def test_the_best_period_is_near_where_least_time_is_lost():
    times, kills = Times(0.25, 0.5, 10), poisson_kills(300, 1_000_000, seed=0)
    lost = {period: outcome_of(times, period, kills, 1_000_000).lost_time_share for period in range(20, 200, 5)}
    assert min(lost, key=lost.get) * times.step_s == pytest.approx(best_period_s(0.5, 300), rel=0.3)


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_times_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must take time"):
        Times(*wrong)


def test_arguments():
    with pytest.raises(ValueError, match="every_n_steps must be positive"):
        outcome_of(TIMES, 0, [], 1)
    with pytest.raises(ValueError, match="must rise within"):
        outcome_of(TIMES, 1, [2, 1], 3)
    with pytest.raises(ValueError, match="must rise within"):
        outcome_of(TIMES, 1, [4], 3)
