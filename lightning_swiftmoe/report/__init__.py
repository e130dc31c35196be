"""One self-contained HTML page from training runs and simulations. Needs the extra ``report`` (Jinja2)."""

from lightning_swiftmoe.report.page import write_report
from lightning_swiftmoe.report.runs import Run, load_runs

__all__ = ["Run", "load_runs", "write_report"]
