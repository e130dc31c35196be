"""``swiftmoe bench step peers=[...]``, from a configuration to tables and ``step.json``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from rich.console import Console

from lightning_swiftmoe.cli._peers.driver import Driver, Row, summary
from lightning_swiftmoe.cli._peers.job import Plan, write_batches
from lightning_swiftmoe.cli._peers.options import PROFILED_STEPS, Options
from lightning_swiftmoe.cli._peers.systems import System, expand, parse
from lightning_swiftmoe.cli._peers.table import (
    kernels_table,
    progress_line,
    systems_table,
    waits_table,
    with_differences,
)

FILE_COLUMNS = 180


def side_by_side(config: DictConfig, options: Options) -> None:
    """Run all systems in turns; print a line after each turn and all tables at the end.

    Raises:
        ValueError: options that do not fit together, or no system that ran.
    """
    num_ranks = ranks_of(config)
    plan = plan_of(config, options, num_ranks)
    systems = systems_of(config, options, num_ranks)
    folder = Path(config.run_dir)
    if options.text:
        plan = replace(plan, batches=str((folder / "batches.npy").absolute()))
        write_batches(folder / "batches.npy", config, plan, num_ranks)
    report = Report(systems, Path(options.output or folder / "step.json"), about(config, options, num_ranks, plan))
    driver = Driver(
        systems,
        config,
        plan,
        options.rounds,
        options.limit_s,
        options.budget_s,
        folder / "peers",
        tell=report.update,
    )
    rows = driver.run()
    report.print_tables()
    if not any(row.rounds for row in rows):
        raise ValueError(f"no system ran; {rows[0].system.label}: {rows[0].error}")


def ranks_of(config: DictConfig) -> int:
    """Processes of a system that uses all devices.

    Raises:
        ValueError: several machines, or no device.
    """
    if config.cluster.num_nodes != 1:
        raise ValueError("peers run on the devices of one machine: use cluster.num_nodes=1")
    devices = config.cluster.devices
    num_ranks = torch.cuda.device_count() if devices == "auto" else int(devices)
    if num_ranks < 1 or (config.cluster.accelerator == "gpu" and torch.cuda.device_count() < num_ranks):
        raise ValueError(f"cluster.devices = {devices}, but there are {torch.cuda.device_count()} GPUs")
    return num_ranks


def plan_of(config: DictConfig, options: Options, num_ranks: int) -> Plan:
    """What is measured."""
    return Plan(
        warmup=options.warmup,
        steps=options.steps,
        profiled=PROFILED_STEPS if options.profile else 0,
        stacks=options.stacks,
        batch_per_rank=options.batch_per_rank or max(1, config.data.batch_size // num_ranks),
        reshard=options.reshard,
    )


def systems_of(config: DictConfig, options: Options, num_ranks: int) -> list[System]:
    """The rows of the table, each with a configuration that composes.

    Raises:
        ValueError: an entry of ``peers`` that means nothing.
    """
    entries = expand([str(entry) for entry in options.peers] or ["ours"], config.strategy.get("slots_per_rank"))
    systems = [parse(entry, num_ranks) for entry in entries]
    with open_dict(config):
        config.logger, config.trainer.num_nodes = {}, 1
    for system in systems:
        system.configure(config)
    return systems


def about(config: DictConfig, options: Options, num_ranks: int, plan: Plan) -> dict[str, Any]:
    """What the numbers are of."""
    gpu = config.cluster.accelerator == "gpu"
    return {
        "command": sys.argv[1:],
        "device": torch.cuda.get_device_name(0) if gpu else "CPU",
        "devices": num_ranks,
        "torch": torch.__version__,
        "precision": str(config.trainer.precision),
        "warmup": plan.warmup,
        "steps": plan.steps,
        "rounds": options.rounds,
        "text": options.text,
        "target_loss": options.target_loss,
        "tokens_per_rank": plan.batch_per_rank * config.data.seq_len,
    }


class Report:
    """Keeps ``step.json`` up to date, so that a run that is cut short leaves what it had.

    Args:
        systems: rows in order.
        path: of the file.
        head: what the numbers are of.
    """

    def __init__(self, systems: list[System], path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.results: dict[str, dict[str, Any]] = {}
        # Into a file or a pipe rich would fold the tables to 80 columns.
        self.console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)

    def update(self, changed: Row, rows: list[Row]) -> None:
        """One row changed."""
        found = {
            row.system.label: summary(row, self.head["tokens_per_rank"], self.head["target_loss"])
            for row in rows
            if row.rounds or row.error
        }
        self.results = with_differences(found)
        label = changed.system.label
        print(progress_line(label, self.results[label]), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.head | {"systems": self.results}, indent=1))

    def print_tables(self) -> None:
        """What all turns together say."""
        head = self.head
        self.console.print(
            f"{head['devices']} x {head['device']}, {head['tokens_per_rank']:,} tokens a rank and step, "
            f"{head['precision']}, torch {head['torch']}",
            highlight=False,
        )
        for table in (systems_table(self.results), kernels_table(self.results), waits_table(self.results)):
            if table is not None:
                self.console.print(table)
                self.console.print()
        for name, result in self.results.items():
            if result["error"]:
                print(f"{name}: {result['error']}", flush=True)
