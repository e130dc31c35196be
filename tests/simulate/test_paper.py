"""The paper's tables in a reduced size: the published numbers stand beside ours, and the order is right."""

import numpy as np
import pytest

from lightning_swiftmoe.cli import simulate as command
from lightning_swiftmoe.simulate import PAPER_MODELS, Hardware, Scenario, Workload, generate
from lightning_swiftmoe.simulate.paper import COMPARISONS, compare, follows, read_tables

A100 = Hardware("A100", 312, 1935, 80, 32, 100, 5, gpus_per_node=1, num_nodes=16)


def scenario():
    return Scenario(PAPER_MODELS["gpt-small"], A100, 4, 1.0, offload=True, published_baselines=True)


def a_trace(num_steps=40):
    return generate("drift", Workload(num_steps, 1, 16, 32768, skew=1.1, pace=1.5))


def cells(table):
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_step_times_are_ordered_as_published():
    tables = compare("step_times", a_trace(), scenario())
    assert len(tables) == 6
    for table in tables[::2]:
        ms = {name: float(row["ms"]) for name, row in cells(table).items()}
        assert ms["proportional"] < ms["swiftmoe_published"] < ms["static"] < ms["flexmoe_10"]
    small = cells(tables[0])
    assert small["swiftmoe_published"]["published vs static"] == "-2.8%"
    assert small["flexmoe_10"]["published vs static"] == "+31.1%"
    for table in tables[1::2]:
        assert table.rows[0][0] == "load"


def test_survival_beside_the_published_drops():
    (table,) = compare("survival", a_trace(), scenario())
    rows = cells(table)
    survival = {name: float(row["survival"].rstrip("%")) for name, row in rows.items()}
    assert survival["static"] <= survival["flexmoe_100"] <= survival["flexmoe_10"] < survival["proportional"]
    assert survival["proportional"] < survival["oracle"]
    assert rows["static"]["published"] == "69%"
    assert float(rows["oracle"]["replicas ~ load"]) > 0.99
    assert rows["static"]["replicas ~ load"] == "0.000"


def test_worked_example_and_scaling():
    (example,) = compare("worked_example", a_trace(1), scenario())
    for row in example.rows:
        published, ours = (float(cell.split()[0].rstrip("%")) for cell in row[1:])
        assert ours == pytest.approx(published, rel=0.002)
    scaling, groups = compare("scaling", a_trace(1), scenario())
    increase = {row[:3]: row[4] for row in scaling.rows}
    assert increase["2,048", "64", "2"] == "+1.52%"
    for column in (1, 2):
        seconds = [float(row[column].split()[0]) for row in groups.rows]
        assert seconds == sorted(seconds)


def test_unknown_comparison():
    with pytest.raises(ValueError, match="unknown comparison paper='nope'; there are worked_example"):
        compare("nope", a_trace(1), scenario())


@pytest.mark.parametrize("recipe", ["worked_example", "scaling", "fig12_13_step_time", "fig8_10_survival"])
def test_recipes_run_from_the_command_line(tmp_path, capsys, recipe):
    reduced = ["workload.num_steps=4", "workload.num_layers=1", f"output={tmp_path}"]
    assert command.main([f"recipes=paper/{recipe}", *reduced]) == 0
    written = (tmp_path / "comparison.md").read_text()
    assert "(computed)" in written or "(modelled)" in written
    assert written.strip() in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for table in read_tables(tmp_path / "comparison.json"):
        assert table.markdown().strip() in written
        assert all(f"<td>{cell}</td>" in page for row in table.rows for cell in row[1:])
    assert len(COMPARISONS) == 4


def test_replicas_that_follow_the_load():
    loads = np.array([[[6, 2, 4, 4], [1, 1, 1, 13]]])
    exact, misplaced = follows(loads, loads)
    assert (exact, misplaced) == (pytest.approx(1.0), 0.0)
    # 4/16 of the slots each: the load of layer 0 has 2/16 elsewhere, that of layer 1 9/16.
    assert follows(loads, np.full_like(loads, 4)) == (0.0, (2 / 16 + 9 / 16) / 2)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"title": 1}]'])
def test_tables_of_another_program(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ValueError, match="holds no tables"):
        read_tables(tmp_path / "comparison.json")
