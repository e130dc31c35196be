"""Reads what training runs and simulations left behind into one shape."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.simulate.cost import PHASES
from lightning_swiftmoe.simulate.paper import Comparison, read_tables
from lightning_swiftmoe.simulate.results import read_simulation, thinned
from lightning_swiftmoe.trace_file import SUFFIX, is_trace, read_trace

_CURVES = {
    "loss": ("train/loss", "train/loss_step", "train_loss", "loss"),
    "val_loss": ("val/loss", "val/loss_epoch", "val_loss"),
    "survival": ("moe/token_survival",),
    "imbalance": ("moe/rank_imbalance",),
    "tokens_per_s": ("moe/tokens_per_s",),
}
_MOST_STEPS = 120


@dataclass(frozen=True, eq=False)
class Series:
    """One line of a chart.

    Args:
        steps: ``[P]``.
        values: ``[P]``.
    """

    steps: NDArray[np.floating]
    values: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Run:
    """A training run, or one policy of a simulation. What was not recorded is empty or None.

    Args:
        name: shown beside its line.
        origin: ``"measured"``, ``"virtual"`` (one process acted as several ranks) or ``"modelled"``.
        curves: by the names of ``_CURVES`` and ``step_ms``.
        load_id: runs with the same one saw the same loads.
        steps: ``[T]`` of loads and replicas.
        loads: ``[T, L, E]`` assignments before drops.
        replicas: ``[T, L, E]`` in force.
        rank_load: ``[L, N]`` assignments processed in the last step, after drops.
        phase_ms: mean time of a phase per step.
        phase_bytes: mean bytes of a phase per step.
        facts: settings worth printing.
        config: the resolved configuration of a training run.
        trace_path: its trace with every step; ``loads`` and ``replicas`` are thinned.
    """

    name: str
    origin: str
    curves: Mapping[str, Series] = field(default_factory=dict)
    load_id: str = ""
    steps: NDArray | None = None
    loads: NDArray | None = None
    replicas: NDArray | None = None
    rank_load: NDArray | None = None
    phase_ms: Mapping[str, float] = field(default_factory=dict)
    phase_bytes: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    trace_path: Path | None = None


def load_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """All runs of these folders: one of a training run, one per policy of a simulation, all jobs of a sweep.

    Names are made unique. A folder of tables alone (``load_tables``) holds no run.

    Raises:
        ValueError: a folder without ``metrics.csv``, ``simulation.json``, ``comparison.json`` or a trace.
    """
    if not folders:
        raise ValueError("no runs to report; name the folder of a training run or a simulation")
    inner = [job for folder in folders for job in _jobs(Path(folder))]
    return _with_unique_names([run for folder in inner if not _tables_of(folder) for run in _load_folder(folder)])


def without_runs(paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` that are there and hold no run: folders of what was refused, files beside runs."""
    return [path for path in paths if Path(path).exists() and not _holds_results(Path(path))]


def _holds_results(path: Path) -> bool:
    if not path.is_dir():
        return path.name == "simulation.json"
    return any(_newest(path, name) is not None for name in _RESULTS) or _find_trace(path) is not None


def first_steps(run: Run, num_steps: int) -> Run:
    """The run as if it had ended after so many steps; a simulation, whose means are made already, as it is."""
    if not run.config:
        return run
    curves = {
        name: Series(series.steps[keep], series.values[keep])
        for name, series in run.curves.items()
        if (keep := series.steps < num_steps).any()
    }
    run = replace(run, curves=curves)
    if run.steps is None:
        return run
    keep = run.steps <= num_steps  # a trace counts from 1, metrics from 0
    loads, replicas = (None if x is None else x[keep] for x in (run.loads, run.replicas))
    return replace(run, steps=run.steps[keep], loads=loads, replicas=replicas, rank_load=None)


def load_tables(folders: Sequence[str | os.PathLike[str]]) -> list[Comparison]:
    """The paper's tables that ``swiftmoe simulate paper=NAME`` left in these folders.

    Raises:
        ValueError: a file of that name that holds something else.
    """
    inner = [job for folder in folders for job in _jobs(Path(folder))]
    return [table for folder in inner if (path := _tables_of(folder)) for table in read_tables(path)]


_RESULTS = ("metrics.csv", "simulation.json", "comparison.json")


def _tables_of(folder: Path) -> Path | None:
    path = folder / "comparison.json"
    return path if path.is_file() else None


def _jobs(folder: Path) -> list[Path]:
    """The folder itself if it holds results, else the finished jobs of the sweeps below it."""
    if not folder.is_dir() or any((folder / name).is_file() for name in _RESULTS):
        return [folder]
    found = {path.parent for name in _RESULTS[1:] for path in folder.rglob(name)}
    found |= {path.parent for path in folder.rglob("metrics.csv") if (path.parent / "config.yaml").is_file()}
    return sorted(found, key=_natural) or [folder]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts job 10 behind job 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.parts]


def _load_folder(folder: Path) -> list[Run]:
    if (folder if folder.is_dir() else folder.parent).joinpath("simulation.json").is_file():
        return _load_simulation(folder)
    if not folder.is_dir():
        raise ValueError(f"no run at {folder}; name the folder that `swiftmoe train` or `swiftmoe simulate` wrote")
    return [_load_training(folder)]


def _load_simulation(folder: Path) -> list[Run]:
    content = read_simulation(folder)
    history, settings = content["history"], content["settings"]
    steps = np.array(history["steps"])
    return [
        Run(
            name=policy,
            origin=content.get("origin", "modelled"),
            curves=_simulated_curves(steps, values["series"]),
            load_id=str(folder),
            steps=steps,
            loads=np.array(history["loads"]),
            replicas=np.array(values["replicas"]),
            rank_load=np.array(values["rank_load"]),
            phase_ms={phase: 1e3 * values["summary"].get(f"{phase}_s", 0.0) for phase in PHASES},
            phase_bytes={
                key.removesuffix("_bytes"): value
                for key, value in values["summary"].items()
                if key.endswith("_bytes") and not key.startswith("total_")
            },
            facts=_simulation_facts(settings),
        )
        for policy, values in content["policies"].items()
    ]


def _simulated_curves(steps: NDArray, series: Mapping[str, Sequence[float]]) -> dict[str, Series]:
    # After drops, as training logs it, so that both can share a chart.
    names = {"survival": "survival", "imbalance": "rank_imbalance_after_drops"}
    curves = {name: Series(steps, np.array(series[key])) for name, key in names.items()}
    return curves | {"step_ms": Series(steps, 1e3 * np.array(series["step_s"]))}


def _simulation_facts(settings: Mapping[str, Any]) -> dict[str, str]:
    hardware, model = settings["hardware"], settings["model"]
    ranks = hardware["gpus_per_node"] * hardware["num_nodes"]
    return {
        "trace": str(settings["trace"]),
        "cluster": f"{ranks} ranks, {hardware['device_name']}",
        "model": f"{model['num_moe_layers']} MoE layers, {model['num_experts']} experts, top-{model['top_k']}",
        "slots per rank": str(settings["slots_per_rank"]),
        "capacity factor": str(settings["capacity_factor"]),
    }


def _load_training(folder: Path) -> Run:
    table = _newest(folder, "metrics.csv")
    trace = _find_trace(folder)
    if table is None and trace is None:
        raise ValueError(f"{folder} holds neither metrics.csv nor simulation.json nor a trace; is it a run?")
    columns = _read_columns(table) if table else {}
    curves = {
        name: columns[column]
        for name, candidates in _CURVES.items()
        if (column := next((c for c in candidates if c in columns), None))
    }
    loads = _read_trace(trace) if trace else {}
    config = _read_config(folder)
    return Run(
        name=folder.resolve().name,
        origin="measured" if pick(config, "cluster.virtual_ranks") is None else "virtual",
        curves=curves,
        load_id=str(folder),
        phase_ms=_means(columns, "moe/ms_"),
        phase_bytes=_means(columns, "moe/bytes_"),
        facts=_config_facts(config),
        config=config,
        trace_path=trace,
        **loads,
    )


def _newest(folder: Path, name: str) -> Path | None:
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime, default=None)


def _find_trace(folder: Path) -> Path | None:
    """The newest: a run that went on with other ranks left its older steps beside it."""
    files = [*folder.rglob(f"*{SUFFIX}"), *folder.rglob("*.npz")]
    newest_first = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in newest_first if is_trace(path)), None)


def _read_columns(path: Path) -> dict[str, Series]:
    """Numeric columns against ``step``; Lightning leaves a cell empty where nothing was logged."""
    points: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            step = float(row.get("step") or number)
            for key, text in row.items():
                value = _number(text)
                if value is not None and key not in ("step", "epoch"):
                    points.setdefault(key, []).append((step, value))
    return {key: Series(*np.array(pairs).T) for key, pairs in points.items()}


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _read_trace(path: Path) -> dict[str, Any]:
    arrays = read_trace(path)
    counts, steps = arrays["counts"], arrays["steps"]
    keep = thinned(len(steps), _MOST_STEPS)
    found: dict[str, Any] = {"steps": steps[keep], "loads": counts[keep].sum(axis=2, dtype=np.int64)}
    if "replicas" in arrays:
        found["replicas"] = arrays["replicas"][keep].astype(np.int64)
    if "rank_load" in arrays:
        found["rank_load"] = arrays["rank_load"][-1].astype(np.float64)
    return found


def _means(columns: Mapping[str, Series], prefix: str) -> dict[str, float]:
    """Means over the second half of a run: the first steps warm caches up. Nothing where nothing was sent."""
    means = {
        key.removeprefix(prefix): float(series.values[series.values.size // 2 :].mean())
        for key, series in columns.items()
        if key.startswith(prefix)
    }
    return means if any(means.values()) else {}


def _read_config(folder: Path) -> dict[str, Any]:
    own = folder / "config.yaml"  # Hydra's, not resolved, lies in a folder below
    path = own if own.is_file() else _newest(folder, "config.yaml")
    if path is None:
        return {}
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def pick(config: Mapping[str, Any], name: str) -> Any:
    """``pick(config, "model.top_k")``; None where a part is missing."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


_FACTS = {
    "ranks": "cluster.virtual_ranks",
    "width": "model.hidden_size",
    "experts": "model.num_experts",
    "top-k": "model.top_k",
    "capacity factor": "model.capacity_factor",
    "aux-loss": "model.aux_loss_coef",
    "slots per rank": "strategy.slots_per_rank",
    "seed": "seed",
}


def _config_facts(config: Mapping[str, Any]) -> dict[str, str]:
    found = {name: pick(config, key) for name, key in _FACTS.items()}
    facts = {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in found.items()
        if value is not None
    }
    return {"policy": system_of(config), **facts} if pick(config, "policy.name") else facts


def system_of(config: Mapping[str, Any]) -> str:
    """What the simulator calls the run's system: its policy, or ``exact`` or ``exact_copies``."""
    policy = policy_of(config)
    exact = pick(config, "strategy.split") == "exact" and pick(config, "strategy.capacity_scope") == "pooled"
    if policy == "balanced" and exact and pick(config, "model.capacity_factor") is not None:
        return "exact_copies" if pick(config, "strategy.transient_copies") else "exact"
    return policy


def policy_of(config: Mapping[str, Any]) -> str:
    """What the simulator calls the run's policy: ``static``, ``proportional``, ``flexmoe_10``, ..."""
    name = pick(config, "policy.name")
    if isinstance(name, Mapping):
        target = str(name.get("_target_", "?")).rpartition(".")[2]
        if target != "FlexMoEPolicy":
            return target
        every = pick(config, "policy.every_n_steps") or 1
        return f"flexmoe_{every}" if every > 1 else "flexmoe"
    if name == "auto":
        return "proportional" if _experts_have_room_of_their_own(config) else "balanced"
    return str(name)


def _experts_have_room_of_their_own(config: Mapping[str, Any]) -> bool:
    pooled = pick(config, "strategy.capacity_scope") == "pooled"
    return pick(config, "model.capacity_factor") is not None and not pooled


def _with_unique_names(runs: list[Run]) -> list[Run]:
    trained = [run for run in runs if run.config]
    differing = [fact for fact in ("policy", *_FACTS) if len({run.facts.get(fact) for run in trained}) > 1]
    if differing:  # what tells jobs of a sweep apart says more than their numbers
        runs = [replace(run, name=_describe(run.facts, differing) or run.name) for run in runs]
    for tell_apart in (_with_origin, _with_folder):
        names = [run.name for run in runs]
        runs = [replace(run, name=tell_apart(run)) if names.count(run.name) > 1 else run for run in runs]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=f"{run.name} ({number})") for number, run in enumerate(runs, start=1)]


def _with_origin(run: Run) -> str:
    return f"{run.name} ({run.origin})"


def _with_folder(run: Run) -> str:
    return f"{Path(run.load_id).name}: {run.name.removesuffix(f' ({run.origin})')}"


def _describe(facts: Mapping[str, str], names: Sequence[str]) -> str:
    """Nothing for a simulation, whose name is its policy: its facts do not name one."""
    if "policy" not in facts:
        return ""
    return ", ".join(facts[name] if name == "policy" else f"{name} {facts[name]}" for name in names if name in facts)
