"""Lays the charts of several runs out on one page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from lightning_swiftmoe.report import svg
from lightning_swiftmoe.report.paper import paper_tables
from lightning_swiftmoe.report.runs import Run, load_runs, load_tables
from lightning_swiftmoe.report.style import OKABE_ITO, byte_size, line_style, number
from lightning_swiftmoe.simulate.cost import PHASES
from lightning_swiftmoe.simulate.paper import Comparison
from lightning_swiftmoe.simulate.results import thinned

_MOST_LAYERS = 6
_PHASE_COLOURS = ("#000000", *OKABE_ITO[:6], "#F0E442", "#999999", "#5B3A8C", "#8C5A2B")


@dataclass(frozen=True)
class Figure:
    """A chart with what it says in words. ``legend`` lists indices of runs."""

    title: str
    chart: Markup
    caption: str
    legend: tuple[int, ...] = ()
    is_wide: bool = False


@dataclass(frozen=True)
class Section:
    """Figures of one kind, side by side, or a table."""

    title: str
    about: str
    figures: tuple[Figure, ...] = ()
    table: Markup = field(default_factory=Markup)


def write_report(folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """One HTML file, everything inside, from the folders of training runs and simulations.

    Args:
        folders: what ``swiftmoe train`` and ``swiftmoe simulate`` wrote.
        path: file to write.

    Raises:
        ValueError: a folder that holds no run.
    """
    runs = load_runs(folders)
    return write_page(runs, [*paper_tables(runs), *load_tables(folders)], path)


def write_page(runs: Sequence[Run], tables: Sequence[Comparison], path: str | os.PathLike[str]) -> Path:
    """The same from runs and tables at hand; either may be empty."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(runs, tables), encoding="utf-8")
    return path


def render(runs: Sequence[Run], tables: Sequence[Comparison] = ()) -> str:
    """The page."""
    sections = (
        *(Section(f"{table.title} ({table.origin})", table.notes, table=_comparison(table)) for table in tables),
        _curves(runs),
        _loads(runs),
        _replicas(runs),
        _rank_loads(runs),
        _breakdown(runs),
        _bytes(runs),
        _staleness(runs),
    )
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("lightning_swiftmoe.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=_title(runs, tables),
        runs=[(run, svg.swatch(line_style(i)), _headline(run)) for i, run in enumerate(runs)],
        sections=[section for section in sections if section.figures or section.table],
    )


def _title(runs: Sequence[Run], tables: Sequence[Comparison]) -> str:
    names = [run.name for run in runs] or [table.title for table in tables]
    return "SwiftMoE: " + "; ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _comparison(table: Comparison) -> Markup:
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name in table.columns)
    rows = [
        Markup("<tr><th scope=row>{}</th>{}</tr>").format(
            row[0], Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        )
        for row in table.rows
    ]
    body = Markup('<div class="scroll"><table class="paper"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
    return body.format(head, Markup("").join(rows))


def _headline(run: Run) -> Mapping[str, str]:
    found = {}
    for name, label in (("loss", "last loss"), ("val_loss", "last validation loss")):
        if name in run.curves:
            found[label] = number(float(run.curves[name].values[-1]))
    if "survival" in run.curves:
        found["mean survival"] = f"{run.curves['survival'].values.mean():.1%}"
    if "imbalance" in run.curves:
        found["mean max/mean rank load after drops"] = f"{run.curves['imbalance'].values.mean():.2f}"
    if "step_ms" in run.curves:
        found["mean modelled step"] = f"{number(float(run.curves['step_ms'].values.mean()))} ms"
    if "tokens_per_s" in run.curves:
        found["tokens/s"] = number(float(run.curves["tokens_per_s"].values.mean()))
    return found


_CURVE_LABELS = {
    "loss": ("Training loss", "loss"),
    "val_loss": ("Validation loss", "loss"),
    "survival": ("Token survival", "processed / routed"),
    "imbalance": ("Rank imbalance, after drops", "max / mean load"),
    "tokens_per_s": ("Throughput", "tokens/s"),
    "step_ms": ("Modelled step time", "ms"),
}


def _curves(runs: Sequence[Run]) -> Section:
    figures = []
    for key, (title, label) in _CURVE_LABELS.items():
        having = tuple(i for i, run in enumerate(runs) if key in run.curves)
        if having:
            curves = [(i, runs[i].curves[key]) for i in having]
            lines = [svg.Line(runs[i].name, c.steps, c.values, line_style(i)) for i, c in curves]
            caption = "; ".join(f"{runs[i].name} ends at {number(float(c.values[-1]))}" for i, c in curves)
            figures.append(Figure(title, svg.line_chart(lines, "step", label), caption, having))
    return Section("Over time", "Long runs are averaged over stretches of steps.", tuple(figures))


def _loads(runs: Sequence[Run]) -> Section:
    figures = []
    for run in _one_per_load(runs):
        assert run.loads is not None
        assert run.steps is not None
        layers = thinned(run.loads.shape[1], _MOST_LAYERS)
        share = run.loads[:, layers] / run.loads[:, layers].sum(axis=2, keepdims=True) * run.loads.shape[2]
        chart = svg.heat_map(share.reshape(len(share), -1), run.steps, run.loads.shape[2])
        chart += svg.heat_scale()
        hottest = np.unravel_index(share.argmax(), share.shape)
        caption = (
            f"Each row is an expert. Hottest: expert {hottest[2]} of layer {layers[hottest[1]]} at step "
            f"{run.steps[hottest[0]]} with {share.max():.1f} times its fair share."
        )
        shown = "" if len(layers) == run.loads.shape[1] else f" (layers {', '.join(map(str, layers))})"
        figures.append(Figure(f"{run.facts.get('trace', run.name)}{shown}", chart, caption))
    return Section("Load of every expert", "Assignments before drops; light is hot.", tuple(figures))


def _replicas(runs: Sequence[Run]) -> Section:
    figures = []
    for i, run in enumerate(runs):
        if run.replicas is None or run.loads is None:
            continue
        slots = run.replicas.sum(axis=2, keepdims=True)
        wanted = (run.loads / run.loads.sum(axis=2, keepdims=True) * slots).ravel()
        got = run.replicas.ravel()
        # In order of load, so that the thinned points span it.
        keep = np.argsort(wanted, kind="stable")[thinned(wanted.size, 400)]
        most = float(max(wanted.max(), 1.0))
        error = float(np.abs(got - np.maximum(wanted, 1)).mean())
        chart = svg.scatter_chart(
            wanted[keep],
            got[keep],
            line_style(i),
            "share of load x slots",
            "replicas",
            [(0.0, 1.0), (1.0, 1.0), (most, most)],
        )
        figures.append(Figure(run.name, chart, f"On average {error:.2f} replicas away from the ideal.", (i,)))
        figures.append(_one_expert(run))
    about = (
        "A point is an expert in a step; on the dashed line replicas match the load of that very step. Beside it one "
        "expert over time, the one whose load varies most (Fig. 9 and 10 of the SwiftMoE paper)."
    )
    return Section("Replicas against load", about, tuple(figures))


def _one_expert(run: Run) -> Figure:
    assert run.loads is not None
    assert run.replicas is not None
    assert run.steps is not None
    slots = run.replicas[0, 0].sum()
    wanted = run.loads / run.loads.sum(axis=2, keepdims=True) * slots
    layer, expert = np.unravel_index(wanted.std(axis=0).argmax(), wanted.shape[1:])
    lines = [
        svg.Line("share of load x slots", run.steps, wanted[:, layer, expert], line_style(6)),
        svg.Line("replicas", run.steps, run.replicas[:, layer, expert].astype(float), line_style(1)),
    ]
    chart = svg.line_chart(lines, "step", "slots", 0.0)
    caption = "Solid with circles: share of load x slots; dashed with squares: its replicas."
    return Figure(f"{run.name}: expert {expert} of layer {layer}", chart, caption)


def _rank_loads(runs: Sequence[Run]) -> Section:
    figures = []
    for i, run in enumerate(runs):
        if run.rank_load is not None and run.rank_load.sum() > 0:
            chart = svg.bar_chart(run.rank_load[0], line_style(i), "rank", "assignments")
            worst = max(float(row.max() / row.mean()) for row in run.rank_load)
            caption = f"Layer 0 of the last step; the dashed line is the mean. Worst layer: max/mean {worst:.2f}."
            figures.append(Figure(run.name, chart, caption, (i,)))
    return Section(
        "Load of every rank", "What every rank processed, after drops. The slowest rank sets the pace.", tuple(figures)
    )


def _breakdown(runs: Sequence[Run]) -> Section:
    having = [run for run in runs if run.phase_ms]
    if not having:
        return Section("", "")
    phases = [p for p in _phase_order(having, "phase_ms") if any(run.phase_ms.get(p, 0) > 0 for run in having)]
    colours = [_PHASE_COLOURS[i % len(_PHASE_COLOURS)] for i in range(len(phases))]
    rows = [(run.name, [run.phase_ms.get(p, 0.0) for p in phases]) for run in having]
    names = ", ".join(f"{i} {phase}" for i, phase in enumerate(phases, start=1))
    figure = Figure(
        "Milliseconds of a step", svg.stacked_bars(rows, colours, "ms"), f"Segments: {names}.", is_wide=True
    )
    table = _table(
        having,
        {f"{i} {p}": [run.phase_ms.get(p) for run in having] for i, p in enumerate(phases, start=1)},
        lambda v: f"{number(v)} ms",
    )
    about = "Means per step. Measured runs list the time of their exchanges only; modelled steps overlap nothing."
    return Section("Where a step's time goes", about, (figure,), table)


def _bytes(runs: Sequence[Run]) -> Section:
    having = [run for run in runs if run.phase_bytes]
    phases = _phase_order(having, "phase_bytes")
    rows = {p: [run.phase_bytes.get(p) for run in having] for p in phases}
    about = "Means per step. Measured: sent by one rank; modelled: sent by all ranks together."
    return Section("Bytes by phase", about, (), _table(having, rows, byte_size) if having else Markup())


def _staleness(runs: Sequence[Run]) -> Section:
    figures = []
    for run in _one_per_load(runs):
        assert run.loads is not None
        assert run.steps is not None
        if len(run.steps) < 2:
            continue
        share = run.loads / run.loads.sum(axis=2, keepdims=True)
        distance = 0.5 * np.abs(np.diff(share, axis=0)).sum(axis=2)
        style, worst = line_style(0), line_style(1)
        lines = [
            svg.Line("mean of layers", run.steps[1:], distance.mean(axis=1), style),
            svg.Line("worst layer", run.steps[1:], distance.max(axis=1), worst),
        ]
        gap = float(np.diff(run.steps).mean())
        name = run.facts.get("trace", run.name)
        caption = (
            f"Solid with circles: mean of layers ({number(float(distance.mean()))} on average); dashed with squares: "
            f"worst layer. Recorded steps are {number(gap)} apart."
        )
        chart = svg.line_chart(lines, "step", "load that moved", 0.0)
        figures.append(Figure(f"{name}: how far loads move", chart, caption))
        before, now = share[:-1].ravel() * 100, share[1:].ravel() * 100
        keep = np.argsort(before, kind="stable")[thinned(before.size, 400)]
        most = float(max(before.max(), now.max()))
        points = svg.scatter_chart(
            before[keep], now[keep], style, "predicted: % one record before", "actual %", [(0.0, 0.0), (most, most)]
        )
        away = float(np.abs(now - before).mean())
        figures.append(Figure(f"{name}: predicted and actual", points, f"Mean error {away:.2f} percentage points."))
    about = (
        "A placement is made from the loads before it. This is what it could not know: the share of "
        "assignments that went to other experts than one record earlier."
    )
    return Section("Staleness", about, tuple(figures))


def _one_per_load(runs: Sequence[Run]) -> list[Run]:
    """Runs with loads; policies of one simulation share theirs."""
    return list({run.load_id: run for run in runs if run.loads is not None}.values())


def _phase_order(runs: Sequence[Run], what: str) -> list[str]:
    present = {phase for run in runs for phase in getattr(run, what)}
    return [p for p in PHASES if p in present] + sorted(present - set(PHASES))


def _table(runs: Sequence[Run], rows: Mapping[str, Sequence[float | None]], text: object) -> Markup:
    assert callable(text)
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(run.name) for run in runs)
    body = []
    for phase, values in rows.items():
        most = max((v for v in values if v is not None), default=0) or 1.0
        cells = [
            Markup("<td>-</td>")
            if value is None
            else Markup('<td><span class="bar" style="width:{:.0f}%"></span><span>{}</span></td>').format(
                90 * value / most,
                text(value),  # a gap between the bars of neighbours
            )
            for value in values
        ]
        body.append(Markup("<tr><th scope=row>{}</th>{}</tr>").format(phase, Markup("").join(cells)))
    table = Markup("<table><thead><tr><th>phase</th>{}</tr></thead><tbody>{}</tbody></table>")
    return Markup('<div class="scroll">{}</div>').format(table.format(head, Markup("").join(body)))
