"""The page's table."""

from __future__ import annotations

from pathlib import Path

from tests.semantics.peers.rows import ROWS
from tests.semantics.peers.systems import SYSTEMS

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
_LONGEST = 150  # characters of a cell


def write_table(page: Path, cells: dict[str, dict[str, str]]) -> None:
    """Put the table of ``cells`` between the page's marks."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(before + BEGIN + table(cells) + END + after)


def table(cells: dict[str, dict[str, str]]) -> str:
    """Rows of ``ROWS`` by systems, in Markdown."""
    lines = ["| what the user does | " + " | ".join(system.label for system in SYSTEMS.values()) + " |"]
    lines.append("|---|" + "---|" * len(SYSTEMS))
    for name, verdicts in cells.items():
        row = ROWS[name]
        found = [_short(verdicts.get(system, "not run")) for system in SYSTEMS]
        path, _, test = row.test.partition("::")
        found[0] += f" ([{test}](../../tests/{path}))"
        lines.append(f"| {row.what} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def _short(verdict: str) -> str:
    """On a line; the whole of it is in the JSON file."""
    verdict = verdict.replace("|", "\\|").replace("`", "")
    return verdict if len(verdict) <= _LONGEST else verdict[:_LONGEST].rstrip() + " ..."
