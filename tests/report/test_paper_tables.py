"""Tables from training runs: seeds together, systems apart, and nothing compared that is not alike."""

import math

import numpy as np
import pytest

from lightning_swiftmoe.report.paper import paper_tables, reached_by_all, spread, steps_to_loss
from lightning_swiftmoe.report.runs import Run, Series, first_steps, system_of

FLEXMOE = {"_target_": "lightning_swiftmoe.placement.flexmoe.FlexMoEPolicy"}


def config(policy, seed=0, every=1, **model):
    model = {"capacity_factor": 1.0, **model}
    return {"policy": {"name": policy, "every_n_steps": every}, "seed": seed, "model": model, "paper": "fig7_table3"}


def a_run(settings, losses, survival):
    steps = np.arange(len(losses))
    curves = {"loss": Series(steps, np.array(losses)), "survival": Series(steps, np.full(len(losses), survival))}
    return Run("x", "virtual", curves, load_id=str(settings), config=settings)


def falling(num_steps, at=1.0):
    return 5 - at * np.arange(num_steps) / num_steps


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (config("static"), "static"),
        (config("auto"), "proportional"),
        (config("auto", capacity_factor=None), "balanced"),
        (config(FLEXMOE, every=50), "flexmoe_50"),
        (config({**FLEXMOE, "threshold": 1.2}), "flexmoe"),
        (config({"_target_": "mine.Policy"}), "Policy"),
        (config("auto") | {"strategy": {"split": "even", "capacity_scope": "pooled"}}, "balanced"),
        (config("auto") | {"strategy": {"split": "exact", "capacity_scope": "pooled"}}, "exact"),
        (config("auto") | {"strategy": {"split": "exact", "capacity_scope": "cluster"}}, "proportional"),
    ],
)
def test_systems(settings, name):
    assert system_of(settings) == name


def test_steps_to_a_loss():
    losses = np.random.default_rng(0).normal(0, 0.1, 200) + falling(200, 3.0)
    run = a_run(config("static"), losses, 1.0)
    for target in (4.9, 4.0, 2.5):
        by_hand = next(n for n in range(20, 201) if losses[n - 20 : n].mean() <= target)
        assert steps_to_loss(run, target) == by_hand
    assert math.isnan(steps_to_loss(run, 1.0))
    every_tenth = Run("x", "virtual", {"loss": Series(np.arange(9, 2000, 10), losses)})
    assert steps_to_loss(every_tenth, 4.0) == 10 * steps_to_loss(run, 4.0)
    slower = a_run(config("static"), falling(200, 0.5), 1.0)
    assert math.isfinite(steps_to_loss(slower, reached_by_all([run, slower])))
    assert math.isnan(steps_to_loss(slower, reached_by_all([run, slower]) - 0.01))


def test_differences_are_of_the_same_seed():
    runs = [a_run(config("static", seed), falling(100), s) for seed, s in [(0, 0.5), (1, 0.6), (2, 0.0)]]
    runs += [a_run(config("proportional", seed), falling(100), s) for seed, s in [(0, 0.9), (1, 0.8)]]
    exact = {"strategy": {"split": "exact", "capacity_scope": "pooled"}}
    runs += [a_run(config("auto", seed) | exact, falling(100, 2.0), s) for seed, s in [(0, 0.95), (2, 0.9)]]
    table = next(table for table in paper_tables(runs) if table.title.startswith("Fig. 8"))
    static, ours, beyond = table.rows
    assert static[0].startswith("static")
    assert static[1] == "63.3 ± 32.1 %"  # 50, 40, 100
    assert static[4:6] == ("-", "65.0 ± 21.2 %")  # 1 - 10/50, 1 - 20/40; no seed 2 of ours
    assert ours[1] == "15.0 ± 7.1 %"
    assert ours[4:6] == ("65.0 ± 21.2 %", "-")
    assert beyond[4:6] == ("90.0 ± 0.0 %", "-")  # 1 - 5/50, 1 - 10/100; not among those of the paper
    steps = next(table for table in paper_tables(runs, 4.5) if table.title.startswith("Fig. 7"))
    assert steps.rows[2][:3] == ("exact split", "36 ± 0", "41.0 ± 0.0 %")  # 61 and 36 of 100
    assert "2-3 seeds" in table.notes


def test_spread():
    assert spread([0.285], ".1%") == "28.5 %"
    assert spread([0.1, 0.2], "+.1%") == "+15.0 ± 7.1 %"
    assert spread([100, 104], ".0f") == "102 ± 3"
    assert spread([1.0, math.nan], ".0f") == spread([], ".0f") == "-"


def test_only_like_is_compared():
    one, other = config("static"), config("proportional", hidden_size=64)
    with pytest.raises(ValueError, match=r"differ in model.hidden_size \(None, 64\); report them apart"):
        paper_tables([a_run(one, falling(30), 0.5), a_run(other, falling(30), 0.5)])
    with pytest.raises(ValueError, match=r"the same run: static, seed 0; name one"):
        paper_tables([a_run(one, falling(30), 0.5)] * 2)
    with pytest.raises(ValueError, match=r"at step 29, others at 30; .* the first 29 steps of all with --steps"):
        paper_tables(early := [a_run(one, falling(30), 0.5), a_run(config("static", 1), falling(30)[:29], 0.5)])
    assert len(paper_tables([first_steps(run, 29) for run in early])) == 3
    with pytest.raises(ValueError, match="stopped at step 0"):
        paper_tables([Run("x", "virtual", config=one)])
    with pytest.raises(ValueError, match="unknown table paper='nope'"):
        paper_tables([a_run({**one, "paper": "nope"}, falling(30), 0.5)])
    assert paper_tables([a_run({**one, "paper": None}, falling(30), 0.5)]) == []
