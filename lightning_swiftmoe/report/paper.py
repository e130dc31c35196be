"""Tables of the SwiftMoE paper from training runs whose config says ``paper: NAME``, several seeds together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_swiftmoe.report.runs import Run, pick, system_of
from lightning_swiftmoe.simulate.paper import Comparison, follows
from lightning_swiftmoe.simulate.published import (
    PUBLISHED_CAPACITY,
    PUBLISHED_DROPPED,
    PUBLISHED_FEWER_DROPS,
    PUBLISHED_FEWER_STEPS,
)

WINDOW = 20  # steps whose mean loss is held against the target
OURS = "proportional"
LABELS = {
    "static": "static (DeepSpeed)",
    OURS: "proportional (SwiftMoE)",
    "swiftmoe_published": "the same, exchange as published",
    "exact": "exact split",
    "exact_copies": "exact split, copies",
}
# Beyond the paper: not among those that SwiftMoE is held against.
BEYOND = ("exact", "exact_copies")
# What may differ between runs of one table: where they ran to, their seed, and what the table is about.
_FREE = ("run_dir", "seed", "report", "policy", "strategy", "callbacks", "logger", "module.seed", "data.seed")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Args:
        name: of the system, and of what else the table varies.
        runs: by seed.
    """

    name: str
    runs: Mapping[int, Run]

    def values(self, measure: Callable[[Run], float]) -> dict[int, float]:
        """One number by seed."""
        return {seed: measure(run) for seed, run in self.runs.items()}


def paper_tables(runs: Sequence[Run], target_loss: float | None = None) -> list[Comparison]:
    """The tables that these runs stand for; none where no config names one.

    Args:
        runs: of any kind.
        target_loss: steps are counted to it; None: the lowest loss that every run reached.

    Raises:
        ValueError: an unknown name, a run without losses or with fewer steps than others, runs of one table that differ
            in more than it varies, or a seed that ran twice.
    """
    names = list(dict.fromkeys(str(run.config["paper"]) for run in runs if run.config.get("paper")))
    tables = []
    for name in names:
        if name not in _TABLES:
            raise ValueError(f"unknown table paper={name!r} in a run's config.yaml; there are {', '.join(_TABLES)}")
        varied, make = _TABLES[name]
        chosen = [run for run in runs if run.config.get("paper") == name]
        _check_alike(chosen, varied)
        _check_complete(chosen)
        tables += make(group(chosen, varied), target_loss or reached_by_all(chosen))
    return tables


def convergence_runs(runs: Sequence[Run]) -> list[Run]:
    """Those of ``paper: fig7_table3``."""
    return [run for run in runs if run.config.get("paper") == "fig7_table3"]


def group(runs: Sequence[Run], varied: Sequence[str] = ()) -> dict[tuple[Any, ...], Group]:
    """Runs by system and varied settings, in order of both.

    Raises:
        ValueError: two runs with the same seed.
    """
    groups: dict[tuple[Any, ...], dict[int, Run]] = {}
    for run in runs:
        key = (system_of(run.config), *(pick(run.config, name) for name in varied))
        seeds, seed = groups.setdefault(key, {}), int(run.config.get("seed", 0))
        if seed in seeds:
            raise ValueError(
                f"{seeds[seed].load_id} and {run.load_id} are the same run: {' '.join(map(str, key))}, seed {seed}; "
                "name one of them"
            )
        seeds[seed] = run
    order = sorted(groups, key=lambda key: (key[1:], _order(key[0])))
    return {key: Group(LABELS.get(key[0], key[0]), groups[key]) for key in order}


def steps_to_loss(run: Run, target: float) -> float:
    """Steps until the mean loss of the last ``WINDOW`` is no more than ``target``; nan if it never is."""
    curve = run.curves["loss"]
    return steps_until(curve.values, target, curve.steps)


def steps_until(losses: ArrayLike, target: float, steps: NDArray[np.floating] | None = None) -> float:
    """The same of a list of losses, of every step from the first one on, or of ``steps``, from 0."""
    values = np.asarray(losses, dtype=np.float64)
    means, last_steps = _window_means(values, np.arange(values.size) if steps is None else steps)
    below = np.flatnonzero(means <= target)
    return float(last_steps[below[0]] + 1) if below.size else math.nan


def reached_by_all(runs: Sequence[Run]) -> float:
    """The lowest loss, to three decimals, to which ``steps_to_loss`` finds every run."""
    curves = [run.curves["loss"] for run in runs]
    return math.ceil(max(_window_means(curve.values, curve.steps)[0].min() for curve in curves) * 1000) / 1000


def _window_means(values: NDArray[Any], steps: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Means of ``WINDOW`` losses, and the number, from 0, of the last step in each."""
    window = min(WINDOW, values.size)
    means = np.convolve(values.astype(np.float64), np.full(window, 1 / window), mode="valid")
    return means, steps[window - 1 :]


def dropped(run: Run, part: float = 0.0) -> float:
    """Fraction of assignments dropped, behind the first ``part`` of the steps."""
    survival = run.curves["survival"].values
    return float(1 - survival[int(part * survival.size) :].mean())


def _capacity(groups: Mapping[tuple[Any, ...], Group], target: float) -> list[Comparison]:
    base = next(iter(groups.values()))
    rows = []
    for (_, factor), found in groups.items():
        kept, steps, forward_ms = PUBLISHED_CAPACITY.get(factor, (math.nan, math.nan, math.nan))
        first = PUBLISHED_CAPACITY[1.0]
        rows.append(
            (
                f"x{factor:g}" if factor is not None else "dropless",
                spread((1 - d for d in found.values(dropped).values()), ".1%"),
                spread([kept], ".1%"),
                spread(found.values(lambda run: steps_to_loss(run, target)).values(), ".0f"),
                spread(_fewer(found, base, lambda run: steps_to_loss(run, target)), ".1%"),
                spread([1 - steps / first[1]], ".1%"),
                spread((-x for x in _fewer(found, base, _step_s)), "+.1%"),
                spread([forward_ms / first[2] - 1], "+.1%"),
            )
        )
    columns = (
        "capacity",
        "tokens kept",
        "published",
        f"steps to loss {target:.3f}",
        "fewer than the first",
        "published",
        "step time",
        "published (forward)",
    )
    notes = "Step time: of the one process that acts as all ranks, which sends nothing; published: forward on 16 GPUs."
    return [Comparison("Table 1, capacity", _origin(groups), columns, tuple(rows), _with_seeds(notes, groups))]


def _convergence(groups: Mapping[tuple[Any, ...], Group], target: float) -> list[Comparison]:
    return [_steps(groups, target), _survival(groups), _replicas(groups)]


def _steps(groups: Mapping[tuple[Any, ...], Group], target: float) -> Comparison:
    ours, static = groups.get((OURS,)), groups.get(("static",))
    rows = [
        (
            found.name,
            spread(found.values(lambda run: steps_to_loss(run, target)).values(), ".0f"),
            spread(_less(found, static, lambda run: steps_to_loss(run, target)), ".1%"),
            spread(_less(ours, found, lambda run: steps_to_loss(run, target)), ".1%") if system not in BEYOND else "-",
            spread([PUBLISHED_FEWER_STEPS.get(system, math.nan)], ".1%"),
            spread(found.values(_last_loss).values(), ".3f"),
        )
        for (system,), found in groups.items()
    ]
    notes = f"A loss is reached when the mean of {WINDOW} steps is. Published: to loss 4.0, other data and tokens."
    columns: tuple[str, ...] = ("system", f"steps to loss {target:.3f}", "fewer than static")
    columns += ("SwiftMoE needs fewer by", "published", "last loss")
    title = "Fig. 7 and table 3, steps to a loss"
    return Comparison(title, _origin(groups), columns, tuple(rows), _with_seeds(notes, groups))


def _survival(groups: Mapping[tuple[Any, ...], Group]) -> Comparison:
    ours, static = groups.get((OURS,)), groups.get(("static",))
    rows = [
        (
            found.name,
            spread(found.values(dropped).values(), ".1%"),
            spread(found.values(_dropped_late).values(), ".1%"),
            spread([PUBLISHED_DROPPED.get(system, math.nan)], ".0%"),
            spread(_less(found, static, dropped), ".1%"),
            spread(_less(ours, found, dropped), ".1%") if system not in BEYOND else "-",
            spread(_less(ours, found, _dropped_late), ".1%") if system not in BEYOND else "-",
            spread([PUBLISHED_FEWER_DROPS.get(system, math.nan)], ".0%"),
        )
        for (system,), found in groups.items()
    ]
    columns = (
        "system",
        "dropped",
        "second half",
        "published, about",
        "fewer than static",
        "SwiftMoE drops fewer by",
        "fewer, second half",
        "published",
    )
    return Comparison("Fig. 8, survival", _origin(groups), columns, tuple(rows), _with_seeds("", groups))


def _replicas(groups: Mapping[tuple[Any, ...], Group]) -> Comparison:
    rows = []
    for found in groups.values():
        both = [
            follows(run.loads, run.replicas)
            for run in found.runs.values()
            if run.loads is not None and run.replicas is not None
        ]
        rows.append((found.name, *(spread([pair[i] for pair in both], ".3f") for i in (0, 1))))
    notes = (
        "Over layers, experts and up to 120 steps: correlation of replicas with the load of the same step, and the "
        "part of the slots that sits with other experts than the load (total variation; 0 is best). Published: curves."
    )
    columns = ("system", "correlation", "slots misplaced")
    title = "Fig. 9 and 10, replicas follow the load"
    return Comparison(title, _origin(groups), columns, tuple(rows), _with_seeds(notes, groups))


def _aux_loss(groups: Mapping[tuple[Any, ...], Group], target: float) -> list[Comparison]:
    systems = list(dict.fromkeys(system for system, _ in groups))
    coefficients = list(dict.fromkeys(coefficient for _, coefficient in groups))
    rows = []
    for coefficient in coefficients:
        found = [groups.get((system, coefficient)) for system in systems]
        cells = [spread(g.values(dropped).values() if g else [], ".1%") for g in found]
        late = [spread(g.values(_dropped_late).values() if g else [], ".1%") for g in found]
        losses = [spread(g.values(_last_loss).values() if g else [], ".3f") for g in found]
        rows.append((f"{coefficient:g}", *cells, *late, *losses))
    published = [f"about {spread([PUBLISHED_DROPPED[s]], '.0%')}" if s in PUBLISHED_DROPPED else "-" for s in systems]
    rows.append(("published, any", *published, *published, *("-" for _ in systems)))
    columns = ["coefficient"]
    for what in ("dropped, ", "second half, ", "last loss, "):
        columns += [what + LABELS.get(system, system) for system in systems]
    notes = "Coefficients are ours; published: drops do not depend on them."
    title = "Fig. 11, weight of the auxiliary loss"
    return [Comparison(title, _origin(groups), tuple(columns), tuple(rows), _with_seeds(notes, groups))]


# Name in the config -> what its runs may differ in, and the tables.
_TABLES: dict[str, tuple[tuple[str, ...], Callable[[Mapping[tuple[Any, ...], Group], float], list[Comparison]]]] = {
    "table1_capacity": (("model.capacity_factor",), _capacity),
    "fig7_table3": ((), _convergence),
    "fig11_aux_loss": (("model.aux_loss_coef",), _aux_loss),
}


def spread(values: Iterable[float], form: str) -> str:
    """Mean and sample standard deviation over seeds: ``28.5 ± 1.2 %``; ``-`` where a value is missing."""
    numbers = list(values)
    if not numbers or any(math.isnan(value) for value in numbers):
        return "-"
    mean = format(float(np.mean(numbers)), form).replace("%", " %")
    if len(numbers) == 1:
        return mean
    deviation = format(float(np.std(numbers, ddof=1)), form.lstrip("+")).rstrip("%")
    return f"{mean[:-2]} ± {deviation} %" if mean.endswith(" %") else f"{mean} ± {deviation}"


def _less(ours: Group | None, theirs: Group | None, measure: Callable[[Run], float]) -> list[float]:
    """By how much ours is less than theirs, seed by seed; nothing for ours itself, or where one did not run."""
    return _fewer(ours, theirs, measure) if ours is not None and theirs is not None and ours is not theirs else []


def _fewer(some: Group, base: Group, measure: Callable[[Run], float]) -> list[float]:
    ours, theirs = some.values(measure), base.values(measure)
    return [1 - ours[seed] / theirs[seed] if theirs[seed] else math.nan for seed in ours if seed in theirs]


def _dropped_late(run: Run) -> float:
    return dropped(run, 0.5)


def _last_loss(run: Run) -> float:
    return float(_window_means(run.curves["loss"].values, run.curves["loss"].steps)[0][-1])


def _step_s(run: Run) -> float:
    if "tokens_per_s" not in run.curves:
        return math.nan
    return 1 / float(np.median(run.curves["tokens_per_s"].values))


def _origin(groups: Mapping[tuple[Any, ...], Group]) -> str:
    return ", ".join(sorted({run.origin for found in groups.values() for run in found.runs.values()}))


def _with_seeds(notes: str, groups: Mapping[tuple[Any, ...], Group]) -> str:
    counts = sorted({len(found.runs) for found in groups.values()})
    seeds = f"{'-'.join(map(str, counts))} seed{'s' if counts[-1] > 1 else ''}"
    text = f"{seeds}; mean ± standard deviation, differences seed by seed." if counts[-1] > 1 else f"{seeds}."
    return f"{notes} {text}".strip()


def _check_complete(runs: Sequence[Run]) -> None:
    ends = {run.load_id: int(run.curves["loss"].steps[-1]) + 1 if "loss" in run.curves else 0 for run in runs}
    longest = max(ends.values())
    for folder, end in ends.items():
        if end == 0 or end < longest:
            hint = f"; leave it out, or compare the first {end} steps of all with --steps" if end else "; leave it out"
            raise ValueError(f"{folder} stopped at step {end}, others at {longest}{hint}")


def _check_alike(runs: Sequence[Run], varied: Sequence[str]) -> None:
    settings = [dict(_flat(run.config)) for run in runs]
    for name in sorted({name for each in settings for name in each}):
        if any(name == free or name.startswith(f"{free}.") for free in (*_FREE, *varied)):
            continue
        values = list(dict.fromkeys(str(each.get(name)) for each in settings))
        if len(values) > 1:
            raise ValueError(
                f"runs of the table {runs[0].config['paper']} differ in {name} ({', '.join(values)}); report them apart"
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _order(system: str) -> tuple[int, int, str]:
    """DeepSpeed, FlexMoE from rare to frequent, others, SwiftMoE last, as the paper lists them; then exact splits."""
    if system.startswith("flexmoe_"):
        return (1, -int(system.split("_")[1]), "")
    if system in BEYOND:
        return (4, 0, system)
    return ({"static": 0, OURS: 3}.get(system, 2), 0, system)
