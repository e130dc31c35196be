"""``swiftmoe simulate``: what placement policies would do with recorded or synthetic loads on a described cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_swiftmoe.arguments import check, check_count
from lightning_swiftmoe.cli._hydra import run_task
from lightning_swiftmoe.cli._mistakes import check_list
from lightning_swiftmoe.cli._scenario import check_mapping, check_values, hardware_of, model_of, scenario_of
from lightning_swiftmoe.cli.report import write_report_of
from lightning_swiftmoe.simulate import (
    LoadTrace,
    Scenario,
    Simulation,
    Workload,
    generate,
    load_trace,
    simulate,
)
from lightning_swiftmoe.simulate.paper import compare, write_tables
from lightning_swiftmoe.simulate.results import overlapped_ms


def main(argv: Sequence[str]) -> int:
    """Entry point: Hydra overrides of ``conf/simulate.yaml``."""
    return run_task("simulate", run, argv)


def run(config: DictConfig) -> None:
    """Simulate, print a table, write ``simulation.json`` and ``.csv``, or a paper's tables, and ``report.html``."""
    check_values(config)
    check_list("policies", config.policies)
    hardware = hardware_of(config)
    trace = _trace(config, hardware.num_ranks)
    scenario = scenario_of(config, model_of(config, trace), hardware)
    folder = Path(config.output)
    if config.paper is None:
        _simulate(config, trace, scenario, folder)
    else:
        tables = compare(config.paper, trace, scenario)
        _clear(folder)
        print("\n".join(table.markdown() for table in tables))
        print(f"wrote {write_tables(tables, folder)}")
    if config.report:
        print(write_report_of(folder) or f"wrote {folder / 'report.html'}")


def _simulate(config: DictConfig, trace: LoadTrace, scenario: Scenario, folder: Path) -> None:
    start = time.perf_counter()
    simulation = simulate(trace, scenario, [str(name) for name in config.policies])
    seconds = time.perf_counter() - start
    _clear(folder)
    simulation.write(folder)
    print_table(simulation)
    print(f"{trace.num_steps} steps, {trace.num_layers} layers, {scenario.hardware.num_ranks} ranks in {seconds:.2f} s")
    print(f"wrote {folder / 'simulation.json'} and {folder / 'simulation.csv'}")


def _clear(folder: Path) -> None:
    """The folder of a run is used again, once there is something new to write."""
    for stale in ("simulation.json", "simulation.csv", "comparison.json", "comparison.md"):
        (folder / stale).unlink(missing_ok=True)


def _trace(config: DictConfig, num_ranks: int) -> LoadTrace:
    if config.steps is not None:
        check_count("steps", config.steps, "null (all) or a positive integer")
    if config.trace is None:
        check_mapping("workload", config.workload, "{num_steps: 100}")
        values = OmegaConf.to_container(config.workload, resolve=True)
        assert isinstance(values, dict)
        try:
            work = Workload(**{str(key): value for key, value in values.items()})
        except TypeError as error:
            raise ValueError(f"workload: {error}; see conf/simulate.yaml for its fields") from error
        except ValueError as error:
            raise ValueError(f"workload.{error}") from error
        trace = generate(config.synthetic, work)
    else:
        check(isinstance(config.trace, str), "trace", config.trace, "null or a file")
        trace = load_trace(config.trace)
    trace = trace.first(config.steps)
    return trace.spread(num_ranks) if config.spread else trace


def print_table(simulation: Simulation) -> None:
    """One row per policy: what survives, how even ranks are, what a modelled step takes."""
    table = Table(title=f"modelled: {simulation.settings['trace']}")
    columns = ("survival", "max/mean rank load", "step ms", "overlapped", "p99 ms", "migrated GB", "rebalance step")
    for column in ("policy", *columns):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, result in simulation.results.items():
        row = result.summary()
        ratio = row["rebalance_ratio"]
        table.add_row(
            name,
            f"{row['mean_survival']:.2%}",
            f"{row['mean_rank_imbalance']:.3f}",
            f"{1e3 * row['mean_step_s']:.1f}",
            overlapped_ms(result, ".1f"),
            f"{1e3 * row['p99_step_s']:.1f}",
            f"{row['total_migration_bytes'] / 1e9:.2f}",
            "-" if ratio != ratio else f"{ratio:.2f}x",
        )
    Console(width=120).print(table)
