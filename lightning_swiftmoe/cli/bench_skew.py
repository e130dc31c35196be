"""``swiftmoe bench skew``: how much of a system's speed under even loads is left under skewed ones."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_swiftmoe.cli._hydra import run_benchmark
from lightning_swiftmoe.cli._mistakes import check_list
from lightning_swiftmoe.cli._models import gpt_of
from lightning_swiftmoe.cli._peers.command import FILE_COLUMNS, about, plan_of, ranks_of
from lightning_swiftmoe.cli._peers.driver import Driver, Row
from lightning_swiftmoe.cli._peers.job import PROFILER_WARMUP, Plan
from lightning_swiftmoe.cli._peers.options import Options, merged_options
from lightning_swiftmoe.cli._peers.replay import loads_of_ranks, write_replay
from lightning_swiftmoe.cli._peers.systems import parse
from lightning_swiftmoe.simulate import GENERATORS, LoadTrace, Workload, generate, load_trace

BALANCED = "balanced"


@dataclass(frozen=True)
class SkewOptions:
    """``conf/bench/skew.yaml`` says what each is for.

    Raises:
        ValueError: a value that means nothing.
    """

    workloads: list[str]
    steps: int
    settle: int
    warmup: int
    skew: float
    pace: float
    systems: list[str]
    known: dict[str, str]
    batch_per_rank: int | None = None
    rounds: int = 1
    profile: bool = False
    limit_s: float = 180.0
    budget_s: float = 480.0
    output: str | None = None

    def __post_init__(self) -> None:
        for key in ("workloads", "systems"):
            value = getattr(self, key)
            check_list(key, value)
            if not value:
                raise ValueError(f"{key} must be a list that is not empty, got {value!r}")
        for key, least in {"settle": 0, "warmup": 1}.items():
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
        unknown = [name for name in self.systems if name not in self.known]
        if unknown:
            raise ValueError(f"systems must be among {', '.join(self.known)}, got {unknown[0]!r}; add it as known.NAME")
        self.as_step_options()

    def as_step_options(self) -> Options:
        """What is common with ``swiftmoe bench step``; refuses what that refuses."""
        return Options(
            peers=[self.known[name] for name in self.systems],
            warmup=self.warmup,
            steps=self.steps,
            rounds=self.rounds,
            profile=self.profile,
            batch_per_rank=self.batch_per_rank,
            limit_s=self.limit_s,
            budget_s=self.budget_s,
        )


OPTION_NAMES = tuple(f.name for f in fields(SkewOptions))


@dataclass(frozen=True)
class Segment:
    """Steps of one workload.

    Args:
        name: of the workload.
        loads: ``[S, L, N, E]`` assignments.
        settle: the first so many steps are not measured.
    """

    name: str
    loads: NDArray[np.int64] = field(repr=False)
    settle: int

    @property
    def expert_skew(self) -> float:
        """Largest over mean load of experts, mean over steps and layers."""
        load = self.loads.sum(axis=2)[self.settle :]
        return float((load.max(axis=-1) / load.mean(axis=-1)).mean())


def main(argv: list[str]) -> int:
    """Overrides as for ``swiftmoe train``, and those of ``conf/bench/skew.yaml``."""
    return run_benchmark("skew", bench, argv, OPTION_NAMES)


def bench(config: DictConfig, own: list[str]) -> None:
    """Run the systems and print the table; results as ``skew.json`` in the run folder, or ``output``.

    Args:
        config: of ``swiftmoe train``.
        own: overrides of ``conf/bench/skew.yaml``.

    Raises:
        ValueError: options that mean nothing, traces that do not fit the model, or no system that ran.
    """
    options = SkewOptions(**merged_options("bench/skew.yaml", config.bench, own, OPTION_NAMES))
    folder, num_ranks = Path(config.run_dir), ranks_of(config)
    plan = plan_of(config, options.as_step_options(), num_ranks)
    segments = segments_of(options, config, plan, num_ranks)
    head = about(config, options.as_step_options(), num_ranks, plan) | {"options": asdict(options)}
    report = Report(segments[1:], Path(options.output or folder / "skew.json"), head)
    rows = run_systems(config, options, num_ranks, segments, folder, report.update)
    report.print()
    if not any(row.rounds for row in rows):
        raise ValueError(f"no system ran; {rows[0].system.label}: {rows[0].error}")


def run_systems(
    config: DictConfig,
    options: SkewOptions,
    num_ranks: int,
    segments: list[Segment],
    folder: Path,
    tell: Callable[[Row, list[Row]], None],
) -> list[Row]:
    """Train the systems of ``options`` on ``num_ranks`` devices through all ``segments``, the first of which warm up.

    Args:
        config: of ``swiftmoe train``.
        options: which systems, how often, how long.
        num_ranks: devices of a system.
        segments: of ``segments_of``.
        folder: for files of the ranks.
        tell: called with a row whenever one changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_of(config, options.as_step_options(), num_ranks)
    loads = [segment.loads for segment in segments]
    if plan.profiled:
        loads.append(loads[-1][-1:].repeat(PROFILER_WARMUP + plan.profiled, axis=0))
    write_replay(folder / "replay.npz", loads, config.model.top_k)
    plan = replace(
        plan,
        steps=sum(len(segment.loads) for segment in segments[1:]),
        replay=str((folder / "replay.npz").absolute()),
    )
    systems = [replace(parse(options.known[name], num_ranks), label=name) for name in options.systems]
    for system in systems:
        system.configure(config)
    return Driver(
        systems, config, plan, options.rounds, options.limit_s, options.budget_s, folder / "peers", tell=tell
    ).run()


def segments_of(options: SkewOptions, config: DictConfig, plan: Plan, num_ranks: int) -> list[Segment]:
    """Balanced steps to warm up with, balanced ones to measure, then the workloads.

    Raises:
        ValueError: no such workload, or a trace of another model.
    """
    model = gpt_of(config)
    num_layers = sum(model.is_moe(number) for number in range(model.num_layers))
    tokens = plan.batch_per_rank * config.data.seq_len
    if model.num_experts > 256 or not num_layers:
        raise ValueError(f"routing is replayed for 1 to 256 experts, got {model.num_experts} in {num_layers} layers")

    def segment(name: str, settle: int, steps: int) -> Segment:
        work = Workload(
            num_steps=settle + steps,
            num_layers=num_layers,
            num_experts=model.num_experts,
            tokens=tokens * num_ranks,
            top_k=model.top_k,
            seed=config.seed,
            skew=options.skew,
            pace=options.pace,
        )
        trace = trace_of(name, work)
        return Segment(name, loads_of_ranks(trace, work.num_steps, num_layers, num_ranks, tokens), settle)

    names = [BALANCED, *(name for name in options.workloads if name != BALANCED)]
    measured = [segment(name, options.settle, options.steps) for name in names]
    return [segment(BALANCED, options.warmup, 0), *measured]


def trace_of(name: str, work: Workload) -> LoadTrace:
    """A generated workload, or ``FILE`` or ``FILE@STEP``.

    Raises:
        ValueError: neither, or a trace with other experts or another ``top_k``.
    """
    if name in GENERATORS:
        return generate(name, work)
    path, _, first = name.partition("@")
    if not Path(path).is_file():
        raise ValueError(f"workload {name!r} is neither a file nor one of {', '.join(GENERATORS)}")
    trace = load_trace(path)
    if (trace.num_experts, trace.top_k) != (work.num_experts, work.top_k):
        raise ValueError(
            f"{path} has {trace.num_experts} experts and top_k {trace.top_k}, the model {work.num_experts} and "
            f"{work.top_k}: set model.num_experts={trace.num_experts} model.top_k={trace.top_k}"
        )
    if not first:
        return trace
    later = np.flatnonzero(np.asarray(trace.steps) >= int(first))
    if not later.size:
        raise ValueError(f"{path} ends at step {int(trace.steps[-1])}, before {first}")
    return LoadTrace(trace.counts[later], np.asarray(trace.steps)[later], trace.top_k, trace.name)


class Report:
    """Keeps ``skew.json`` up to date, so that a run that is cut short leaves what it had.

    Args:
        segments: of all systems, behind the warm-up.
        path: of the file.
        head: what the numbers are of.
    """

    def __init__(self, segments: list[Segment], path: Path, head: dict[str, Any]) -> None:
        self.segments, self.path, self.head = segments, path, head
        self.systems: dict[str, dict[str, Any]] = {}

    def update(self, changed: Row, rows: list[Row]) -> None:
        """One system ran, or failed."""
        label = changed.system.label
        self.systems[label] = measured_of(changed, self.segments)
        found = self.systems[label]
        print(f"{label}: {found['error'] or ', '.join(cells(found, self.names))}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        skews = {segment.name: segment.expert_skew for segment in self.segments}
        self.path.write_text(json.dumps(self.head | {"hottest_expert": skews, "systems": self.systems}, indent=1))

    @property
    def names(self) -> list[str]:
        """Workloads in order, balanced ones first."""
        return [segment.name for segment in self.segments]

    def print(self) -> None:
        """The table: milliseconds, and what is left of the balanced steps' speed."""
        head = self.head
        console = Console(width=FILE_COLUMNS)
        console.print(
            f"{head['devices']} x {head['device']}, {head['tokens_per_rank']:,} tokens a rank and step, "
            f"{head['precision']}, torch {head['torch']}",
            highlight=False,
        )
        table = Table("ms a step (share of balanced)", box=None, pad_edge=False)
        for segment in self.segments:
            table.add_column(segment.name, justify="right")
        table.add_row("hottest expert to mean", *(f"{segment.expert_skew:.2f}" for segment in self.segments))
        for label, found in self.systems.items():
            table.add_row(label, *(cells(found, self.names) or [found["error"] or ""]))
        console.print(table)


def measured_of(row: Row, segments: list[Segment]) -> dict[str, Any]:
    """Mean milliseconds of a step by workload, on the slowest rank, and the fullest rank's memory.

    Of several rounds every step counts as it was fastest: loads are the same in all, what else a host does is not.
    ``imbalance`` is max/mean load of the ranks by workload, where it is known, and ``exposed_ms`` what a rank at most
    communicates and does nothing else, in steps like the last, under the profiler.
    """
    found: dict[str, Any] = {"error": row.error, "step_ms": {}, "imbalance": {}, "allocated_gib": None}
    if not row.rounds:
        return found
    steps_ms = [
        [max(of_ranks) for of_ranks in zip(*(result.steps_ms for result in ranks), strict=True)] for ranks in row.rounds
    ]
    fastest = [min(of_rounds) for of_rounds in zip(*steps_ms, strict=True)]
    first = row.rounds[0]
    imbalances = first[0].imbalances
    at = 0
    for segment in segments:
        measured = slice(at + segment.settle, at + len(segment.loads))
        found["step_ms"][segment.name] = statistics.fmean(fastest[measured])
        if imbalances[measured]:
            found["imbalance"][segment.name] = statistics.fmean(imbalances[measured])
        at += len(segment.loads)
    profiles = [result.profile for result in first if result.profile and result.profile["kernel_ms"]]
    return found | {
        "allocated_gib": max(result.allocated_gib for ranks in row.rounds for result in ranks),
        "exposed_ms": max((profile["exposed_ms"] for profile in profiles), default=None),
        "losses": first[0].losses,
    }


def cells(found: dict[str, Any], names: list[str]) -> list[str]:
    """``12.3 (97 %)`` by workload; nothing of a system that did not run."""
    steps = found["step_ms"]
    return [f"{steps[name]:.1f} ({steps[BALANCED] / steps[name]:.0%})" for name in names] if steps else []
