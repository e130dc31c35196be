"""One self-contained HTML page from training runs and simulations. Needs the extra ``report`` (Jinja2)."""

from lightning_swiftmoe.report.minutes import minutes_tables
from lightning_swiftmoe.report.page import write_page, write_report
from lightning_swiftmoe.report.paper import paper_tables
from lightning_swiftmoe.report.runs import Run, first_steps, load_runs, load_tables, without_runs

__all__ = [
    "Run",
    "first_steps",
    "load_runs",
    "load_tables",
    "minutes_tables",
    "paper_tables",
    "without_runs",
    "write_page",
    "write_report",
]
