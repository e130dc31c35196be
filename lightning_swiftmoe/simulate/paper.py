"""Tables of the SwiftMoE paper beside what our cost model and replay give. Every table names its origin."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.simulate.cost import PHASES
from lightning_swiftmoe.simulate.load_trace import LoadTrace
from lightning_swiftmoe.simulate.model import PAPER_MODELS
from lightning_swiftmoe.simulate.published import (
    PUBLISHED_FEWER_DROPS,
    PUBLISHED_REBALANCE_RATIO,
    PUBLISHED_STEP_CHANGE,
    PhaseFormula,
    grouped_network_s,
    implied_step_ratio,
    worked_example,
)
from lightning_swiftmoe.simulate.replay import Scenario, simulate
from lightning_swiftmoe.simulate.results import PolicyResult

SYSTEMS = ("static", "flexmoe_100", "flexmoe_50", "flexmoe_10", "swiftmoe_published", "proportional")


@dataclass(frozen=True)
class Comparison:
    """A table with its origin.

    Args:
        title: what it stands for.
        origin: ``"computed"`` from the formula, or ``"modelled"``.
        columns: headings.
        rows: as many cells each.
        notes: how to read it.
    """

    title: str
    origin: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: str = ""

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"### {self.title} ({self.origin})", "", _row(self.columns), _row(["---"] * len(self.columns))]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, "", self.notes, ""])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def compare_worked_example(trace: LoadTrace, scenario: Scenario) -> list[Comparison]:
    """The example of section 4, from the formula; loads and cluster are not used."""
    with_host, in_hbm = worked_example(), worked_example(math.inf)
    rows = (
        ("gradients + weights, SwiftMoE", "0.273 s", f"{2 * with_host.swiftmoe_s:.4f} s"),
        ("gradients + weights, static", "0.269 s", f"{2 * with_host.static_s:.4f} s"),
        ("increase, state in host memory", "1.52 %", f"{with_host.increase:.3%}"),
        ("increase, state in device memory", "1.54 %", f"{in_hbm.increase:.3%}"),
    )
    notes = "G = W = 3.375 GB, E = 64, N = 2,048, s = 2, 64 GB/s PCIe, 400 Gb/s network."
    return [Comparison("Worked example", "computed", ("", "published", "ours"), rows, notes)]


def compare_scaling(trace: LoadTrace, scenario: Scenario) -> list[Comparison]:
    """What the formula says of other sizes, and of an optimizer split over groups of ranks."""
    example = worked_example()
    sizes = [(16, 16, 4), (64, 64, 2), (256, 64, 2), (2048, 64, 2), (2048, 64, 8), (16384, 256, 2), (64, 256, 8)]
    rows = []
    for num_ranks, num_experts, slots in sizes:
        formula = dataclasses.replace(example, num_ranks=num_ranks, num_experts=num_experts, slots_per_rank=slots)
        replicas = num_ranks * slots / num_experts
        rows.append((f"{num_ranks:,}", str(num_experts), str(slots), f"{replicas:g}", f"{formula.increase:+.2%}"))
    notes = (
        "SwiftMoE's gradient and weight phases against static replication, by the published formula, on the links of "
        "the worked example. The increase is small only where an expert has many replicas: `r = sN/E` of them send "
        "`(r-1)/r` of what they hold when state is bound, `(N-1)/N` when it is decoupled."
    )
    columns = ("ranks", "experts", "slots per rank", "replicas", "increase")
    return [Comparison("Scaling argument", "computed", columns, tuple(rows), notes), _groups(example)]


def _groups(example: PhaseFormula) -> Comparison:
    replicas = np.full(64, 1)
    replicas[0] += 4096 - 64 - 63 * 8
    replicas[1:] += 8
    rows = [
        (
            str(k),
            f"{grouped_network_s([64] * 64, k, example):.4f} s",
            f"{grouped_network_s(replicas.tolist(), k, example):.4f} s",
        )
        for k in (1, 2, 8, 64)
    ]
    notes = (
        "Network time of a phase in the hottest of k groups; never below k = 1. Even: 64 replicas each; skewed: one "
    )
    notes += "expert holds 3,529 of 4,096 slots."
    return Comparison("Optimizer over k groups", "computed", ("k", "even", "skewed"), tuple(rows), notes)


def compare_step_times(trace: LoadTrace, scenario: Scenario) -> list[Comparison]:
    """Fig. 12 and 13: step times and their breakdown on the paper's cluster, three model sizes, the same loads."""
    tables = []
    for name, model in PAPER_MODELS.items():
        sized = dataclasses.replace(scenario, model=model)
        results = simulate(repeated(trace, model.num_moe_layers), sized, SYSTEMS).results
        tables.append(_step_table(name, results))
        tables.append(_breakdown_table(name, results))
    return tables


def repeated(trace: LoadTrace, num_layers: int) -> LoadTrace:
    """The trace with its layers repeated in turn: the model has more than were recorded."""
    layers = np.arange(num_layers) % trace.num_layers
    return LoadTrace(trace.counts[:, layers], trace.steps, trace.top_k, trace.name)


def _step_table(model: str, results: Mapping[str, PolicyResult]) -> Comparison:
    static_s = results["static"].step_s.mean()
    swift_s = results["swiftmoe_published"].step_s.mean()
    published = {"swiftmoe_published": f"{PUBLISHED_STEP_CHANGE[model]:+.1%}"}
    if model == "gpt-small":
        static = implied_step_ratio("static")
        for name in ("flexmoe_100", "flexmoe_50", "flexmoe_10"):
            published[name] = f"{implied_step_ratio(name) / static - 1:+.1%}"
    rows = []
    for name, result in results.items():
        ratio = result.rebalance_ratio
        rows.append(
            (
                name,
                f"{1e3 * result.step_s.mean():.1f}",
                f"{result.step_s.mean() / static_s - 1:+.1%}",
                published.get(name, "-"),
                f"{result.step_s.mean() / swift_s - 1:+.1%}",
                "-" if math.isnan(ratio) else f"{ratio:.2f}x",
            )
        )
    low, high = PUBLISHED_REBALANCE_RATIO
    notes = (
        "`static` stands for DeepSpeed; `swiftmoe_published` all-reduces, then collects, as the paper's code does; "
        "`proportional` is our direct reduce-to-shard and one weight copy per resident. Published changes of FlexMoE "
        f"follow from Table 3 (minutes over steps). Published rebalancing steps: {low}-{high}x of ordinary ones."
    )
    columns = ("system", "ms", "vs static", "published vs static", "vs swiftmoe_published", "rebalancing step")
    return Comparison(f"Fig. 12, step time, {model}", "modelled", columns, tuple(rows), notes)


def _breakdown_table(model: str, results: Mapping[str, PolicyResult]) -> Comparison:
    rows = [(phase, *(f"{1e3 * result.phase_s[phase].mean():.2f}" for result in results.values())) for phase in PHASES]
    notes = "ms per step. New parts of SwiftMoE are `load` and `placement` (published: 1.06 / 0.82 / 0.70 % of a step)."
    return Comparison(f"Fig. 13, breakdown, {model}", "modelled", ("phase", *results), tuple(rows), notes)


def compare_survival(trace: LoadTrace, scenario: Scenario) -> list[Comparison]:
    """Fig. 8 to 10: survival, and how replicas follow loads, from one trace."""
    systems = [*SYSTEMS[:4], "proportional", "oracle"]
    sized = dataclasses.replace(
        scenario, model=dataclasses.replace(scenario.model, num_experts=trace.num_experts, top_k=trace.top_k)
    )
    simulation = simulate(trace, sized, systems)
    dropped = {name: 1 - result.mean_survival for name, result in simulation.results.items()}
    rows = []
    for name, result in simulation.results.items():
        fewer = 1 - dropped["proportional"] / dropped[name] if dropped[name] else 0.0
        rows.append(
            (
                name,
                f"{result.mean_survival:.1%}",
                f"{fewer:.0%}" if name in PUBLISHED_FEWER_DROPS else "-",
                f"{PUBLISHED_FEWER_DROPS[name]:.0%}" if name in PUBLISHED_FEWER_DROPS else "-",
                *(f"{value:.3f}" for value in follows(simulation.loads, result.replicas)),
            )
        )
    notes = (
        f"Loads: {trace.name}, {trace.num_steps} steps. Published: SwiftMoE drops about 10 %, DeepSpeed about 40 %. "
        "The last columns hold replicas against the load of the same step: their correlation, and the part of the "
        "slots that sits with other experts than the load (Fig. 9 and 10 show curves)."
    )
    columns = ("system", "survival", "SwiftMoE drops fewer by", "published", "replicas ~ load", "slots misplaced")
    return [Comparison("Fig. 8-10, survival and replicas", "modelled", columns, tuple(rows), notes)]


def follows(loads: NDArray, replicas: NDArray) -> tuple[float, float]:
    """How closely replicas follow the loads of the same step.

    Args:
        loads: ``[T, L, E]`` assignments.
        replicas: ``[T, L, E]`` in force.

    Returns:
        The correlation of replicas with shares of load over everything (0 where either is constant), and the mean total
        variation of slots against load: the part of the slots that sits with other experts than the load, 0 .. 1.
    """
    share = loads / loads.sum(axis=2, keepdims=True)
    slots = replicas / replicas.sum(axis=2, keepdims=True)
    misplaced = float(0.5 * np.abs(share - slots).sum(axis=2).mean())
    if replicas.std() == 0 or share.std() == 0:
        return 0.0, misplaced
    return float(np.corrcoef(share.ravel(), replicas.ravel())[0, 1]), misplaced


COMPARISONS: dict[str, Callable[[LoadTrace, Scenario], list[Comparison]]] = {
    "worked_example": compare_worked_example,
    "scaling": compare_scaling,
    "step_times": compare_step_times,
    "survival": compare_survival,
}


def compare(name: str, trace: LoadTrace, scenario: Scenario) -> list[Comparison]:
    """The tables of that name.

    Raises:
        ValueError: no such comparison.
    """
    if name not in COMPARISONS:
        raise ValueError(f"unknown comparison paper={name!r}; there are {', '.join(COMPARISONS)}")
    return COMPARISONS[name](trace, scenario)


def write_tables(tables: Sequence[Comparison], folder: str | os.PathLike[str]) -> Path:
    """``comparison.md`` to read, and ``comparison.json`` for ``read_tables``; returns the first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(
        json.dumps([dataclasses.asdict(table) for table in tables], indent=1) + "\n"
    )
    path = folder / "comparison.md"
    path.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
    return path


def read_tables(path: str | os.PathLike[str]) -> list[Comparison]:
    """What ``write_tables`` wrote.

    Raises:
        ValueError: something else.
    """
    try:
        return [
            Comparison(**{**table, "columns": tuple(table["columns"]), "rows": tuple(map(tuple, table["rows"]))})
            for table in json.loads(Path(path).read_text())
        ]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no tables ({error}); write it with `swiftmoe simulate paper=NAME`") from error
