"""The paper's training recipes from the command line, reduced: a sweep, then its table beside the published one."""

import csv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")

from lightning_swiftmoe.cli import report, train
from lightning_swiftmoe.cli.recipes import recipes
from lightning_swiftmoe.report import load_runs, minutes_tables, paper_tables

REDUCED = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.ffn_size=32",
    "data.limit_bytes=400000",
    "data.seq_len=64",
    "data.batch_size=16",
    "optimizer.lr=0.003",
    "trainer.max_steps=25",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs the jobs of a recipe; the folder that holds them."""
    monkeypatch.chdir(tmp_path)

    def run(recipe, *overrides):
        base = tmp_path / "multirun" / "paper" / recipe
        jobs = [f"hydra.sweep.dir={base}/{len(list(base.glob('*')))}", *overrides]
        assert train.main(["-m", f"recipes=paper/{recipe}", *REDUCED, *jobs]) == 0
        return base

    return run


def cells(table):
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def first(cell):
    return float(cell.split()[0])


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_every_training_recipe_of_the_paper_is_here():
    virtual = {name for name, about in recipes().items() if "(virtual)" in about}
    assert virtual == {"paper/fig7_table3", "paper/table1_capacity", "paper/fig11_aux_loss"}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_fig7_table3(sweep, capsys):
    base = sweep("fig7_table3", "seed=0,1")
    assert report.main([str(base), "-o", "out/page.html"]) == 0
    written = Path("out/page.md").read_text()
    assert written.strip() in capsys.readouterr().out

    runs = load_runs([base])
    assert len(runs) == 10
    steps, survival, replicas = (cells(table) for table in paper_tables(runs))
    systems = ["static (DeepSpeed)", "flexmoe_100", "flexmoe_50", "flexmoe_10", "proportional (SwiftMoE)"]
    assert list(steps) == list(survival) == list(replicas) == systems
    assert [row["published"] for row in steps.values()] == ["28.5 %", "15.6 %", "12.1 %", "0.0 %", "-"]
    assert [row["published"] for row in survival.values()] == ["69 %", "64 %", "62 %", "43 %", "-"]

    dropped = {name: first(row["dropped"]) for name, row in survival.items()}
    assert dropped[systems[4]] < dropped[systems[3]] < dropped[systems[0]]
    misplaced = {name: first(row["slots misplaced"]) for name, row in replicas.items()}
    assert misplaced[systems[4]] < misplaced[systems[3]] < misplaced[systems[0]]
    assert first(replicas[systems[0]]["correlation"]) == 0

    # Steps to the loss again, from the files and by counting.
    (column,) = (name for name in steps[systems[0]] if name.startswith("steps to loss"))
    found = []
    for folder in sorted((base / "0").glob("[01]")):
        values = losses(folder)
        found.append(next(n for n in range(20, 26) if sum(values[n - 20 : n]) / 20 <= float(column.split()[-1])))
    mean, deviation = np.mean(found), np.std(found, ddof=1)
    assert steps[systems[0]][column] == f"{mean:.0f} ± {deviation:.0f}"

    (table,) = minutes_tables(load_runs([base / "0" / "0"]))
    ((_, step_ms, minutes, *_),) = table.rows
    assert float(minutes) == pytest.approx(25 * float(step_ms) / 60e3, abs=6e-4)  # its own lowest loss, at its end
    minutes = {row[0]: first(row[2]) for row in minutes_tables(runs)[0].rows}
    assert minutes["proportional (SwiftMoE)"] < minutes["the same, exchange as published"] < minutes[systems[0]]
    assert "147.84" in written
    assert "| 102.68 | -30.5 % |" in written

    page = Path("out/page.html").read_text()
    assert "Fig. 8, survival (virtual)" in page
    assert "static, seed 1" in page  # what tells the jobs apart names them


def test_table1_capacity(sweep):
    base = sweep("table1_capacity", "model.num_experts=32")
    (table,) = paper_tables(load_runs([base]))
    assert table.origin == "virtual"
    rows = cells(table)
    assert list(rows) == ["x1", "x2", "x4"]
    assert [row[2] for row in table.rows] == ["44.9 %", "65.6 %", "74.9 %"]
    assert [row[5] for row in table.rows] == ["0.0 %", "14.7 %", "22.7 %"]
    kept = [first(row["tokens kept"]) for row in rows.values()]
    assert kept == sorted(kept)
    assert kept[0] + 5 < kept[2] <= 100


@pytest.mark.exhaustive
def test_fig11_aux_loss(sweep):
    base = sweep("fig11_aux_loss", "model.aux_loss_coef=0.00001,0.1", "strategy=static", "report=false")
    assert not list(base.rglob("report.html"))
    sweep("fig11_aux_loss", "model.aux_loss_coef=0.00001,0.1", "strategy=paper")
    assert len(list(base.rglob("report.html"))) == 2
    (table,) = paper_tables(load_runs([base]))
    rows = cells(table)
    assert list(rows) == ["1e-05", "0.1", "published, any"]
    static, ours = "dropped, static (DeepSpeed)", "dropped, proportional (SwiftMoE)"
    assert (rows["published, any"][static], rows["published, any"][ours]) == ("about 40 %", "about 10 %")
    for coefficient in ("1e-05", "0.1"):
        assert first(rows[coefficient][ours]) < first(rows[coefficient][static])
    assert first(rows["0.1"][static]) < first(rows["1e-05"][static])  # what an auxiliary loss is for
