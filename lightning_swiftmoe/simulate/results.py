"""What a simulation says, and how it is written down."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.simulate.cost import PHASES

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, eq=False)
class PolicyResult:
    """One system over a whole trace. Arrays are per step, ``T`` steps; means over steps and layers.

    Args:
        policy: name of the system.
        survival: ``[T]`` assignments processed / routed, all layers together.
        rank_imbalance: ``[T]`` max/mean load of the ranks before drops, mean over layers.
        rank_imbalance_after_drops: ``[T]`` the same for what is processed.
        phase_s: phase -> ``[T]`` modelled seconds, all layers.
        phase_bytes: phase -> ``[T]`` bytes sent by all ranks, all layers.
        hidden_s: ``[T]`` seconds of the weight and gradient phases that our runtime hides behind computing; 0 for
            other systems than ours, and where state crosses PCIe.
        moved_residents: ``[T]`` residents that reached a new rank after the step, all layers.
        mean_survival: processed / routed of the whole trace.
        replicas: ``[T, L, E]`` replicas in force, for reports.
        rank_load: ``[L, N]`` assignments processed in the last step, after drops, for reports.
    """

    policy: str
    survival: NDArray[np.float64]
    rank_imbalance: NDArray[np.float64]
    rank_imbalance_after_drops: NDArray[np.float64]
    phase_s: Mapping[str, NDArray[np.float64]]
    phase_bytes: Mapping[str, NDArray[np.float64]]
    hidden_s: NDArray[np.float64]
    moved_residents: NDArray[np.int64]
    mean_survival: float
    mean_rank_imbalance: float
    replicas: NDArray[np.int64]
    rank_load: NDArray[np.float64]

    @property
    def step_s(self) -> NDArray[np.float64]:
        """``[T]`` modelled step time, one phase after the other: an upper bound for systems that overlap."""
        return np.sum([self.phase_s[phase] for phase in PHASES], axis=0)

    @property
    def overlapped_step_s(self) -> NDArray[np.float64]:
        """``[T]`` the same without what is hidden."""
        return self.step_s - self.hidden_s

    @property
    def migration_bytes(self) -> float:
        """Optimizer state and weights moved because placements changed, whole trace, all ranks."""
        return float(self.phase_bytes["migration"].sum())

    @property
    def rebalance_ratio(self) -> float:
        """Mean time of the steps that migrate over that of those that do not; nan without either kind."""
        migrates = self.phase_bytes["migration"] > 0
        if migrates.all() or not migrates.any():
            return math.nan
        return float(self.step_s[migrates].mean() / self.step_s[~migrates].mean())

    def summary(self) -> dict[str, float]:
        """Flat numbers, the row of the CSV file."""
        step_s = self.step_s
        row = {
            "mean_survival": self.mean_survival,
            "dropped_fraction": 1 - self.mean_survival,
            "mean_rank_imbalance": self.mean_rank_imbalance,
            "mean_rank_imbalance_after_drops": float(self.rank_imbalance_after_drops.mean()),
            "mean_step_s": float(step_s.mean()),
            **{f"p{p}_step_s": float(np.percentile(step_s, p)) for p in PERCENTILES},
            "max_step_s": float(step_s.max()),
            "mean_overlapped_step_s": float(self.overlapped_step_s.mean()),
            "rebalance_ratio": self.rebalance_ratio,
            "total_migration_bytes": self.migration_bytes,
            "moved_residents": float(self.moved_residents.sum()),
        }
        row |= {f"{phase}_s": float(self.phase_s[phase].mean()) for phase in PHASES}
        return row | {f"{phase}_bytes": float(values.mean()) for phase, values in self.phase_bytes.items()}


@dataclass(frozen=True, eq=False)
class Simulation:
    """All systems over the same trace.

    Args:
        results: by name of the system.
        steps: ``[T]`` step numbers.
        loads: ``[T, L, E]`` assignments routed.
        settings: what was simulated, ready for JSON.
    """

    results: Mapping[str, PolicyResult]
    steps: NDArray[np.int64]
    loads: NDArray[np.int64]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """``simulation.json`` with everything and ``simulation.csv`` with one row per policy."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "simulation.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
        with (folder / "simulation.csv").open("w", newline="") as file:
            rows = [{"policy": name, **result.summary()} for name, result in self.results.items()]
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def to_json(self) -> dict[str, Any]:
        """Numbers by policy; histories are thinned to what a report can show. No nan: absent is null."""
        keep = thinned(len(self.steps), 100)
        return {
            "settings": dict(self.settings),
            "origin": "modelled",
            "history": {"steps": self.steps[keep].tolist(), "loads": self.loads[keep].tolist()},
            "policies": {name: _policy_json(result, keep) for name, result in self.results.items()},
        }


def overlapped_ms(result: PolicyResult, digits: str) -> str:
    """Mean of a step in ms, for a table; a dash where nothing is known to be hidden."""
    return format(1e3 * float(result.overlapped_step_s.mean()), digits) if result.hidden_s.any() else "-"


def _policy_json(result: PolicyResult, keep: Sequence[int]) -> dict[str, Any]:
    summary = {key: None if math.isnan(value) else value for key, value in result.summary().items()}
    series = {
        "survival": result.survival,
        "rank_imbalance": result.rank_imbalance,
        "rank_imbalance_after_drops": result.rank_imbalance_after_drops,
        "step_s": result.step_s,
        "migration_bytes": result.phase_bytes["migration"],
    }
    return {
        "summary": summary,
        "series": {name: values[keep].tolist() for name, values in series.items()},
        "replicas": result.replicas[keep].tolist(),
        "rank_load": result.rank_load[:, thinned(result.rank_load.shape[1], 256)].tolist(),
    }


def thinned(num_items: int, most: int) -> list[int]:
    """At most ``most`` indices, evenly spaced, the first and last among them."""
    return sorted({round(i) for i in np.linspace(0, num_items - 1, min(num_items, most))})


def read_simulation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``simulation.json`` of a folder, or the file itself.

    Raises:
        ValueError: no such file, or none of ours.
    """
    path = Path(path)
    path = path / "simulation.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no simulation ({error}); write one with `swiftmoe simulate`") from error
    if not isinstance(content, dict) or "policies" not in content:
        raise ValueError(f"{path} holds no policies; write it with `swiftmoe simulate`")
    return content


def describe(value: Any) -> Any:
    """Dataclasses as JSON, for ``settings``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: describe(getattr(value, spec.name)) for spec in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
