"""``python -m tests.semantics.peers``: its verdicts, and that the tests it names exist."""

import json
from pathlib import Path

import pytest

from tests.semantics.peers.__main__ import main, try_cell
from tests.semantics.peers.rows import ROWS
from tests.semantics.peers.table import BEGIN, END

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ROWS)
def test_the_test_of_a_row_exists(name):
    file, _, test = ROWS[name].test.partition("::")
    assert f"def {test}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "system", "verdict"),
    [
        ("plain", "ours", "right"),
        ("balances_load", "ddp", "wrong: weights off by "),
        ("trace", "ddp", "-"),
    ],
)
def test_verdicts(name, system, verdict):
    assert try_cell(name, system)[0].startswith(verdict)


def test_cells_that_do_not_run_stay(tmp_path, capsys):
    page, file = tmp_path / "page.md", tmp_path / "cells.json"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    file.write_text(json.dumps({"trace": {"ours": "old", "ddp": "a | b"}}))
    assert main(["rows=trace", "systems=ours", f"json={file}", f"page={page}"]) == 0
    assert json.loads(file.read_text()) == {"trace": {"ours": "right, by the test", "ddp": "a | b"}}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert r"a \| b" in text
    assert "old" not in text


def test_a_mistake_is_one_line(capsys):
    assert main(["row=trace"]) == 2
    assert capsys.readouterr().err == "error: unknown setting 'row'; there are rows, systems, json, page\n"
    assert main(["rows=plain,plane"]) == 2
    assert capsys.readouterr().err.startswith("error: rows=plane is unknown; there are plain, in_eval_mode, ")
