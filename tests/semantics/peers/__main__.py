"""``python -m tests.semantics.peers``: what Lightning users do, on ours and on other strategies, beside one process.

Options: ``rows=NAME,...``, ``systems=NAME,...`` (all without them); ``json=FILE`` to write, where cells that do not
run stay; ``page=FILE`` whose table is written anew.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.semantics.peers.cells import Cell, Ended
from tests.semantics.peers.rows import ROWS
from tests.semantics.peers.systems import SYSTEMS
from tests.semantics.peers.table import write_table
from tests.settings import settings_of


def main(argv: list[str]) -> int:
    """Run cells and write what they found."""
    try:
        options = settings_of(argv, {"rows": ",".join(ROWS), "systems": ",".join(SYSTEMS), "json": "", "page": ""})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, known in (("rows", ROWS), ("systems", SYSTEMS)):
        unknown = [name for name in options[key].split(",") if name not in known]
        if unknown:
            print(f"error: {key}={','.join(unknown)} is unknown; there are {', '.join(known)}", file=sys.stderr)
            return 2
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    file = Path(options["json"]) if options["json"] else None
    cells = json.loads(file.read_text()) if file is not None and file.exists() else {}
    began = time.monotonic()
    for name in options["rows"].split(","):
        for system in options["systems"].split(","):
            verdict, seconds = try_cell(name, system)
            cells.setdefault(name, {})[system] = verdict
            print(f"{name:24} {system:15} {seconds:5.1f} s  {verdict}", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    cells = {name: cells[name] for name in ROWS if name in cells}
    if file is not None:
        file.write_text(json.dumps(cells, indent=1) + "\n")
    if options["page"]:
        write_table(Path(options["page"]), cells)
    return 0


def try_cell(name: str, system: str) -> tuple[str, float]:
    """The verdict on a system in a row, and seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            verdict = ROWS[name].fn(Cell(SYSTEMS[system], Path(folder)))
        except Ended as ended:
            verdict = str(ended)
    return verdict.replace(folder, "FOLDER"), time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
