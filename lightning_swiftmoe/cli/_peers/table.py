"""Systems side by side, for people and for ``step.json``."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COMPARED_STEPS = 8  # first losses that are compared: later ones drift apart by rounding alone
WAITS_SHOWN = 8


def reference_of(results: dict[str, dict[str, Any]], gpus: int) -> str | None:
    """Whose losses others on as many GPUs are compared with: ours where it ran, else the first that did."""
    ran = [name for name, result in results.items() if result["gpus"] == gpus and "losses" in result]
    return next((name for name in ran if name.startswith("ours")), ran[0] if ran else None)


def loss_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference over the first steps."""
    pairs = list(zip(losses, reference, strict=False))[:COMPARED_STEPS]
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)


def with_differences(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``results``, each with ``loss_difference`` and whom it is measured from."""
    found = {}
    for name, result in results.items():
        reference = reference_of(results, result["gpus"])
        if "losses" not in result or reference is None:
            found[name] = result
            continue
        difference = loss_difference(result["losses"], results[reference]["losses"])
        found[name] = result | {"loss_reference": reference, "loss_difference": difference}
    return found


def systems_table(results: dict[str, dict[str, Any]]) -> Table:
    """Times, memory and losses."""
    table = Table("system", box=None, pad_edge=False)
    times = ("GPUs", "mean ms", "median", "worst", "wall ms", "tokens/s")
    for heading in (*times, "alloc GiB", "reserved", "survival", "last loss", "loss diff"):
        table.add_column(heading, justify="right")
    to_loss = any("steps_to_loss" in result for result in results.values())
    for heading in ("steps to loss", "minutes") if to_loss else ():
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(name, *cells(result), *(until_cells(result) if to_loss else ()))
    return table


def until_cells(result: dict[str, Any]) -> list[str]:
    """How long to the loss that was asked for; "-" where it was never reached."""
    if "steps_to_loss" not in result:
        return ["-", "-"]
    return [f"{result['steps_to_loss']:.0f}", f"{result['minutes_to_loss']:.3f}"]


def cells(result: dict[str, Any]) -> list[str]:
    """Of one row, behind its name."""
    if "losses" not in result:
        return [str(result["gpus"]), "failed", *[""] * 9]
    step, survival = result["step_ms"], result["survival"]
    return [
        str(result["gpus"]),
        *(f"{step[key]:.1f}" for key in ("mean", "median", "worst")),
        f"{result['wall_ms']:.1f}",
        f"{result['tokens_per_s']:,.0f}",
        f"{result['allocated_gib']:.1f}",
        f"{result['reserved_gib']:.1f}",
        "" if survival is None else f"{survival:.1%}",
        f"{result['losses'][-1]:.4f}",
        f"{result['loss_difference']:.1e}" if "loss_difference" in result else "",
    ]


def progress_line(name: str, result: dict[str, Any]) -> str:
    """As soon as a system's turn is over."""
    if "losses" not in result:
        return f"{name}: {result['error']}"
    step = result["step_ms"]
    line = f"{name}: mean {step['mean']:.1f} ms, worst {step['worst']:.1f} ms, {result['tokens_per_s']:,.0f} tokens/s"
    return line + (f"; then {result['error']}" if result["error"] else f" (round {result['rounds']})")


def kernels_table(results: dict[str, dict[str, Any]]) -> Table | None:
    """Kernel time by kind and what the GPU did beside, ms a step of rank 0; None where nothing was profiled."""
    profiles = {name: result["profile"][0] for name, result in results.items() if result.get("profile")}
    profiles = {name: profile for name, profile in profiles.items() if profile["kernel_ms"]}  # none on a CPU
    if not profiles:
        return None
    kinds = list(dict.fromkeys(kind for profile in profiles.values() for kind in profile["kernel_ms"]))
    table = Table("ms a step, profiled", box=None, pad_edge=False)
    for name in profiles:
        table.add_column(name, justify="right")
    for kind in kinds:
        table.add_row(kind, *(f"{profile['kernel_ms'].get(kind, 0.0):.2f}" for profile in profiles.values()))
    for key, heading in {
        "span_ms": "whole step",
        "idle_ms": "GPU idle",
        "communication_ms": "communication",
        "exposed_ms": "  of it exposed",
        "state_ms": "expert state",
        "state_exposed_ms": "  of it exposed",
    }.items():
        table.add_row(heading, *(f"{profile[key]:.2f}" for profile in profiles.values()))
    for key, heading in {"launches": "kernel launches", "copies": "cudaMemcpyAsync"}.items():
        table.add_row(heading, *(f"{profile[key]:.0f}" for profile in profiles.values()))
    waits = [profile["host_waits"] for profile in profiles.values()]
    table.add_row("host waits", *(f"{sum(wait['count'] for wait in each):.0f}" for each in waits))
    table.add_row("host waits, ms", *(f"{sum(wait['ms'] for wait in each):.2f}" for each in waits))
    return table


def waits_table(results: dict[str, dict[str, Any]]) -> Table | None:
    """The longest waits of each system's host, by cause, on rank 0."""
    table = Table("system", "host waits in", box=None, pad_edge=False)
    table.add_column("a step", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("cause")
    for name, result in results.items():
        for wait in (result.get("profile") or [{"host_waits": []}])[0]["host_waits"][:WAITS_SHOWN]:
            table.add_row(name, wait["call"], f"{wait['count']:.1f}", f"{wait['ms']:.3f}", wait["cause"])
    return table if table.row_count else None
