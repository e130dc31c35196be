"""Table 3 in minutes: steps to a loss from virtual runs, times the step that the cost model gives for their loads."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

from omegaconf import OmegaConf

from lightning_swiftmoe.report.paper import (
    BEYOND,
    LABELS,
    OURS,
    convergence_runs,
    group,
    reached_by_all,
    spread,
    steps_to_loss,
)
from lightning_swiftmoe.report.runs import Run
from lightning_swiftmoe.simulate import PAPER_MODELS, Hardware, LoadTrace, Scenario, load_trace, simulate
from lightning_swiftmoe.simulate.paper import Comparison, repeated
from lightning_swiftmoe.simulate.published import PUBLISHED_MINUTES

_MODEL = PAPER_MODELS["gpt-small"]
_AS_PUBLISHED = "swiftmoe_published"


def minutes_tables(runs: Sequence[Run], target_loss: float | None = None) -> list[Comparison]:
    """Minutes to a loss on the paper's cluster; nothing without runs of ``paper: fig7_table3`` with traces that fit it.

    A run's own trace is replayed under its policy for GPT-Small on 16 A100, state in host memory, FlexMoE and DeepSpeed
    as published. SwiftMoE is there twice: with the exchange of its code, and with ours.

    Args:
        runs: of any kind.
        target_loss: as for ``paper_tables``.
    """
    chosen = convergence_runs(runs)
    traces = {
        run.load_id: load_trace(run.trace_path).first(int(run.curves["loss"].steps[-1]) + 1)
        for run in chosen
        if run.trace_path is not None
    }
    if not chosen or not all(_fits(traces.get(run.load_id)) for run in chosen):
        return []
    target, scenario = target_loss or reached_by_all(chosen), _scenario()
    minutes: dict[str, dict[int, float]] = {}
    step_ms: dict[str, list[float]] = {}
    for (system,), found in group(chosen).items():
        if system not in (*PUBLISHED_MINUTES, *BEYOND):
            continue
        for name in (OURS, _AS_PUBLISHED) if system == OURS else (system,):
            step_s = {seed: _step_s(traces[run.load_id], name, scenario) for seed, run in found.runs.items()}
            steps = found.values(lambda run: steps_to_loss(run, target))
            minutes[name] = {seed: steps[seed] * step_s[seed] / 60 for seed in steps}
            step_ms[name] = [1e3 * value for value in step_s.values()]
    base, base_published = minutes.get("static", {}), PUBLISHED_MINUTES["static"]
    rows = []
    for name, values in minutes.items():
        ratios = [values[seed] / base[seed] - 1 for seed in values if seed in base] if name != "static" else []
        printed = PUBLISHED_MINUTES.get(OURS if name == _AS_PUBLISHED else name)
        rows.append(
            (
                LABELS.get(name, name),
                spread(step_ms[name], ".1f"),
                spread(values.values(), ".3f"),
                spread(ratios, "+.1%"),
                "-" if printed is None or name == OURS else f"{printed:.2f}",
                "-" if printed is None or name in (OURS, "static") else spread([printed / base_published - 1], "+.1%"),
            )
        )
    columns: tuple[str, ...] = ("system", "modelled ms", f"minutes to loss {target:.3f}", "against static")
    columns += ("published, to 4.0", "against DeepSpeed")
    notes = "A step of GPT-Small on 16 A100 under the loads of the run, times the steps the run took to the loss."
    return [Comparison("Table 3, minutes to a loss", "virtual steps, modelled times", columns, tuple(rows), notes)]


def _fits(trace: LoadTrace | None) -> bool:
    return trace is not None and (trace.num_ranks, trace.num_experts, trace.top_k) == (16, _MODEL.num_experts, 1)


def _scenario() -> Scenario:
    with as_file(files("lightning_swiftmoe.conf").joinpath("cluster/a100_16x1.yaml")) as path:
        hardware = Hardware.from_mapping(OmegaConf.to_container(OmegaConf.load(path))["hardware"])  # type: ignore
    return Scenario(_MODEL, hardware, slots_per_rank=4, capacity_factor=1.0, offload=True, published_baselines=True)


def _step_s(trace: LoadTrace, system: str, scenario: Scenario) -> float:
    result = simulate(repeated(trace, _MODEL.num_moe_layers), scenario, [system]).results[system]
    return float(result.step_s.mean())
