"""``swiftmoe recipes``: what there is to train, and what it is."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from rich.table import Table


def main(argv: list[str]) -> int:
    """Print every recipe with the first comment of its file; exit status 2 for a user's mistake."""
    if {"-h", "--help"} & set(argv):
        print("usage: swiftmoe recipes\n\nLists what recipes=NAME may name, and what each is for.")
        return 0
    if argv:
        said = "swiftmoe recipes lists all, swiftmoe train recipes=NAME runs one"
        print(f"error: recipes takes no arguments, got {' '.join(argv)}: {said}", file=sys.stderr)
        return 2
    from lightning_swiftmoe.cli.tables import make_console  # brings Lightning; names of recipes need none

    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, about in recipes().items():
        table.add_row(name, about)
    make_console().print(table)
    return 0


def recipes() -> dict[str, str]:
    """Recipe names and descriptions, sorted."""
    root = Path(str(files("lightning_swiftmoe.conf.recipes")))
    found = {}
    for path in sorted(root.rglob("*.yaml")):
        lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
        found[path.relative_to(root).with_suffix("").as_posix()] = next((x for x in lines if "@package" not in x), "")
    return found
