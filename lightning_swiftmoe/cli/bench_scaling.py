"""``swiftmoe bench scaling``: steps on one, two, four and eight devices, beside what the simulator expects of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_swiftmoe.cli._dotted import leaves
from lightning_swiftmoe.cli._hydra import run_benchmark
from lightning_swiftmoe.cli._measured import write_whole
from lightning_swiftmoe.cli._mistakes import check_list
from lightning_swiftmoe.cli._models import gpt_of
from lightning_swiftmoe.cli._peers.command import FILE_COLUMNS, about, plan_of
from lightning_swiftmoe.cli._peers.driver import Row
from lightning_swiftmoe.cli._peers.options import merged_options
from lightning_swiftmoe.cli._scenario import shape_of
from lightning_swiftmoe.cli.bench_skew import BALANCED, Segment, SkewOptions, measured_of, run_systems, segments_of
from lightning_swiftmoe.cluster import resolve_slots
from lightning_swiftmoe.simulate import Hardware, LoadTrace, Scenario, simulate

Results = dict[str, Any]
HEADINGS = (
    *("ms a step", "tokens/s a device", "of one device", "modelled ms", "scaled", "off by"),
    *("exposed ms", "max/mean", "peak GiB"),
)
# What all systems of a file share: sections of the configuration, and options.
SECTIONS = ("model", "strategy", "policy", "optimizer")
SHARED_OPTIONS = ("workloads", "steps", "settle", "warmup", "skew", "pace", "rounds", "known", "hardware")
# Every rank keeps an equal part of the experts, whatever their loads.
EXPERTS_AT_HOME = ("torchtitan", "deepspeed", "deepspeed_cap1")


@dataclass(frozen=True)
class ScalingOptions(SkewOptions):
    """``conf/bench/scaling.yaml`` says what each is for.

    Raises:
        ValueError: a value that means nothing.
    """

    ranks: tuple[int, ...] = ()
    predict: bool = False
    hardware: str = "h200_8x8"
    alone: tuple[str, ...] = ()
    modelled: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("ranks", "alone"):
            check_list(key, getattr(self, key))
        if not self.ranks or any(not isinstance(number, int) or number < 1 for number in self.ranks):
            raise ValueError(f"ranks must be a list of positive integers, got {list(self.ranks)}")
        if not isinstance(self.predict, bool):
            raise ValueError(f"predict must be true or false, got {self.predict!r}")
        unknown = [name for name in self.alone if name not in self.known]
        if unknown:
            raise ValueError(f"alone must be among {', '.join(self.known)}, got {unknown[0]!r}; add it as known.NAME")

    def only(self, missing: list[str]) -> SkewOptions:
        """For the systems that have not run yet."""
        values = {f.name: getattr(self, f.name) for f in fields(SkewOptions)}
        return SkewOptions(**(values | {"systems": missing}))

    def names(self, num_ranks: int) -> list[str]:
        """Systems on so many devices."""
        return list(self.alone if num_ranks == 1 else self.systems)


OPTION_NAMES = tuple(f.name for f in fields(ScalingOptions))


def main(argv: list[str]) -> int:
    """Overrides as for ``swiftmoe train``, and those of ``conf/bench/scaling.yaml``."""
    return run_benchmark("scaling", bench, argv, OPTION_NAMES)


def bench(config: DictConfig, own: list[str]) -> None:
    """Run what ``output`` lacks, and print the table.

    Args:
        config: of ``swiftmoe train``.
        own: overrides of ``conf/bench/scaling.yaml``.

    Raises:
        ValueError: options that mean nothing, or a file of other sizes.
    """
    options = ScalingOptions(**merged_options("bench/scaling.yaml", config.bench, own, OPTION_NAMES))
    options = replace(options, batch_per_rank=options.batch_per_rank or config.data.batch_size)
    plan = plan_of(config, options.as_step_options(), 1)
    path = Path(options.output or Path(config.run_dir, "scaling.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    results: Results = json.loads(path.read_text()) if path.is_file() else {}
    settings = settings_of(config, options)
    check_settings(results.setdefault("settings", settings), settings, path)
    available = torch.cuda.device_count() if config.cluster.accelerator == "gpu" else max(options.ranks)
    for num_ranks in options.ranks:
        segments = segments_of(options, config, plan, num_ranks)
        found = results.setdefault("devices", {}).setdefault(str(num_ranks), {"systems": {}})
        found["modelled_ms"] = modelled_ms(config, options, segments, num_ranks)
        found["imbalance_at_home"] = {segment.name: imbalance_at_home(segment, num_ranks) for segment in segments[1:]}
        write_whole(path, results, indent=1)
        if not options.predict and num_ranks <= available:
            run_missing(config, options, segments, num_ranks, found["systems"], lambda: write_whole(path, results, 1))
    print_table(results)


def settings_of(config: DictConfig, options: ScalingOptions) -> dict[str, Any]:
    """What all numbers of a file have in common: systems and numbers of devices may come one after the other."""
    assert options.batch_per_rank is not None
    settings = {
        "tokens_per_rank": options.batch_per_rank * config.data.seq_len,
        "seq_len": config.data.seq_len,
        "precision": str(config.trainer.precision),
        "gradient_clip_val": config.trainer.gradient_clip_val,
        "seed": config.seed,
        **{name: getattr(options, name) for name in SHARED_OPTIONS},
        **{name: OmegaConf.to_container(config[name], resolve=True) for name in SECTIONS},
    }
    # As a file has them: lists, no tuples.
    as_in_a_file: dict[str, Any] = json.loads(json.dumps(settings))
    return as_in_a_file


def check_settings(known: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Those of a file and of this run are the same.

    Raises:
        ValueError: they differ; all differences are named.
    """
    before, now = leaves(known), leaves(asked)
    different = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if different:
        told = "; ".join(f"{name} = {before.get(name)!r}, this run {now.get(name)!r}" for name in different)
        raise ValueError(f"{path} was measured with {told}: name another output")


def run_missing(
    config: DictConfig,
    options: ScalingOptions,
    segments: list[Segment],
    num_ranks: int,
    measured: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Systems on ``num_ranks`` devices that ``measured`` lacks join it one by one, and are saved."""
    missing = [name for name in options.names(num_ranks) if not measured.get(name, {}).get("step_ms")]
    if not missing:
        return
    step_options = options.as_step_options()
    head = about(config, step_options, num_ranks, plan_of(config, step_options, num_ranks))

    def tell(changed: Row, rows: list[Row]) -> None:
        label = changed.system.label
        measured[label] = measured_of(changed, segments[1:]) | {"about": head}
        save()
        print(f"{num_ranks}: {label}: {changed.error or measured[label]['step_ms']}", flush=True)

    folder = Path(config.run_dir, f"ranks{num_ranks}")
    run_systems(config, options.only(missing), num_ranks, segments, folder, tell)


def imbalance_at_home(segment: Segment, num_ranks: int) -> float | None:
    """Max/mean load of ranks that hold equal parts of the experts, in order; mean over steps and layers.

    None where ranks would hold different numbers of them.
    """
    loads = segment.loads[segment.settle :].sum(axis=2)
    if loads.shape[-1] % num_ranks:
        return None
    of_ranks = loads.reshape(*loads.shape[:2], num_ranks, -1).sum(axis=-1)
    return float((of_ranks.max(axis=-1) / of_ranks.mean(axis=-1)).mean())


def modelled_ms(
    config: DictConfig, options: ScalingOptions, segments: list[Segment], num_ranks: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by system and workload, on so many devices of ``options.hardware``.

    The placement of a step comes from the loads of the step before, as in training.
    """
    cluster = OmegaConf.create((files("lightning_swiftmoe.conf") / f"cluster/{options.hardware}.yaml").read_text())
    hardware = Hardware.from_mapping(OmegaConf.to_container(cluster.hardware, resolve=True))  # type: ignore[arg-type]
    model = gpt_of(config)
    slots = resolve_slots(config.strategy.slots_per_rank, model.num_experts, num_ranks)
    scenario = Scenario(
        shape_of(model.sizes()),
        hardware.with_ranks(num_ranks),
        max(slots, -(-model.num_experts // num_ranks)),
        capacity_factor=model.capacity_factor,
        offload=config.strategy.offload_optimizer,
    )
    expected: dict[str, dict[str, float]] = {}
    for name, system in (options.modelled or {}).items():
        if name not in options.names(num_ranks):
            continue
        for segment in segments[1:]:
            trace = LoadTrace(segment.loads, np.arange(len(segment.loads)), model.top_k, segment.name)
            step_s = simulate(trace, scenario, [system]).results[system].overlapped_step_s[segment.settle :]
            expected.setdefault(name, {})[segment.name] = 1e3 * float(step_s.mean())
    return expected


def print_table(results: Results) -> None:
    """A row for each number of devices, system and workload."""
    table = Table("devices", "system", "loads", box=None, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    tokens = results["settings"]["tokens_per_rank"]
    base = base_of(results)
    for number, found in sorted(results["devices"].items(), key=lambda item: int(item[0])):
        names = dict.fromkeys([*found["systems"], *found["modelled_ms"]])
        for name in names:
            system = found["systems"].get(name, {})
            modelled = found["modelled_ms"].get(name, {})
            for load in dict.fromkeys([*system.get("step_ms", {}), *modelled]):
                table.add_row(number, name, load, *cells(found, name, load, tokens, base))
            if system.get("error"):
                table.add_row(number, name, system["error"])
    Console(width=FILE_COLUMNS).print(table)
    print("scaled: one device's measured step, times what the model says of more of them")
    print("exposed: communication under the profiler beside which nothing is computed, in steps of the last loads,")
    print("  of the rank that has most of it; where hosts are not equally fast, that is the wait for another rank's")
    print(
        "max/mean: load of the ranks, mean over steps and layers; of torchtitan and DeepSpeed, whose experts have one"
    )
    print("  home, computed from the loads")


def base_of(results: Results) -> tuple[float, float] | None:
    """Measured and modelled milliseconds of one device under balanced loads; None before it ran."""
    found = results["devices"].get("1", {"systems": {}, "modelled_ms": {}})
    for name, system in found["systems"].items():
        modelled = found["modelled_ms"].get(name, {}).get(BALANCED)
        if BALANCED in system.get("step_ms", {}) and modelled:
            return system["step_ms"][BALANCED], modelled
    return None


def cells(found: Results, name: str, load: str, tokens: int, base: tuple[float, float] | None) -> list[str]:
    """Of one row, behind what it is about.

    Args:
        found: on one number of devices.
        name: of the system.
        load: of the workload.
        tokens: of a step on one device.
        base: of ``base_of``.
    """
    system = found["systems"].get(name, {})
    measured = system.get("step_ms", {}).get(load)
    modelled = found["modelled_ms"].get(name, {}).get(load)
    scaled = None if base is None or modelled is None else base[0] * modelled / base[1]
    per_device = None if measured is None else f"{tokens / measured * 1e3:,.0f}"
    off = None if scaled is None or measured is None else f"{scaled / measured - 1:+.1%}"
    share = None if base is None or measured is None else f"{base[0] / measured:.1%}"
    imbalance = system.get("imbalance", {}).get(load)
    if measured is not None and name in EXPERTS_AT_HOME:
        imbalance = found["imbalance_at_home"][load]
    is_last = load == next(reversed(system.get("step_ms", {})), None)
    values = (
        _number(measured, ".1f"),
        per_device,
        share,
        _number(modelled, ".1f"),
        _number(scaled, ".1f"),
        off,
        _number(system.get("exposed_ms") if is_last else None, ".1f"),
        _number(imbalance, ".2f"),
        _number(system.get("allocated_gib"), ".1f"),
    )
    return ["-" if value is None else value for value in values]


def _number(value: float | None, digits: str) -> str | None:
    return None if value is None else format(value, digits)
