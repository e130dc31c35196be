"""``swiftmoe plan``: does the model fit the cluster, and how long would a step take?"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_swiftmoe.arguments import check_choice, check_count, check_not_negative
from lightning_swiftmoe.cli._hydra import run_task
from lightning_swiftmoe.cli._scenario import check_values, hardware_of, model_of, scenario_of
from lightning_swiftmoe.cluster import min_slots
from lightning_swiftmoe.simulate import PHASES, Scenario
from lightning_swiftmoe.simulate.planning import (
    RUNTIME_BYTES,
    MemoryPlan,
    Run,
    largest_slots,
    memory_per_rank,
    modelled_step,
    smallest_ranks,
)
from lightning_swiftmoe.simulate.results import overlapped_ms


def main(argv: Sequence[str]) -> int:
    """Entry point: Hydra overrides of ``conf/plan.yaml``."""
    return run_task("plan", run, argv)


def run(config: DictConfig) -> None:
    """Print memory, limits and the modelled step."""
    check_values(config)
    tokens = config.tokens_per_rank
    check_count("tokens_per_rank", tokens)
    check_count("hf_seq_len", config.hf_seq_len)
    check_choice("dense", config.dense, ("ddp", "fsdp2"))
    check_not_negative("skew", config.skew)
    for override in HydraConfig.get().overrides.task:
        _check_read(override, config)
    scenario = scenario_of(config, model_of(config), hardware_of(config))
    training = Run(tokens, config.offload, config.dense, scenario.capacity_factor, scenario.hardware.gpus_per_node)
    memory = memory_per_rank(scenario.model, scenario.hardware.num_ranks, scenario.slots_per_rank, training)
    console = Console(width=100)
    console.print(_memory_table(scenario, memory))
    for line in _limits(scenario, memory, training):
        console.print(line, highlight=False)
    console.print(_step_table(scenario, tokens, config.skew))


def _check_read(override: str, config: DictConfig) -> None:
    """Raise a ValueError for what would be left unread, with ``hf`` or without."""
    name = override.lstrip("+~").partition("=")[0].partition(".")[0]
    if config.hf is None:
        if name in ("hf_seq_len", "hf_recompute"):
            raise ValueError(f"{override} is for a model by hf=FOLDER: name one, or leave it out")
    elif name == "model":
        raise ValueError(f"hf={config.hf} brings a model of its own: leave out {override}, or hf")
    elif name == "capacity_factor" and config.capacity_factor is not None:
        raise ValueError(f"hf={config.hf} drops no token: leave out {override}")


def _memory_table(scenario: Scenario, memory: MemoryPlan) -> Table:
    model, hardware = scenario.model, scenario.hardware
    table = Table(
        title=f"{model.total_params / 1e9:.2f} B parameters on {hardware.num_ranks} x {hardware.device_name}, "
        f"{scenario.slots_per_rank} slots per rank and layer"
    )
    table.add_column("memory of one rank")
    table.add_column("GB", justify="right")
    where = "host" if memory.shards_on_host else "device"
    rows = {
        "dense weights, gradients and optimizer state": memory.dense_bytes,
        "expert weights in slots": memory.expert_weight_bytes,
        "expert gradients on their way": memory.expert_grad_bytes,
        f"expert shards: master copy and gradient ({where})": memory.shard_bytes,
        f"expert shards: moments ({where})": memory.moment_bytes,
        "activations": memory.activation_bytes,
        "tokens on their way": memory.row_bytes,
        "runtime": RUNTIME_BYTES,
        "device memory needed": memory.device_bytes,
        "device memory there is": hardware.hbm_gb * 1e9,
    }
    for name, num_bytes in rows.items():
        table.add_row(name, f"{num_bytes / 1e9:.2f}")
    return table


def _limits(scenario: Scenario, memory: MemoryPlan, training: Run) -> list[str]:
    model, hardware = scenario.model, scenario.hardware
    fits = memory.device_bytes <= hardware.hbm_gb * 1e9
    most = largest_slots(model, hardware, training)
    ranks = smallest_ranks(model, hardware, training)
    fewest = min_slots(model.num_experts, hardware.num_ranks)
    slots = f"{fewest} to {most} slots per rank fit" if most else f"not even {fewest} slots per rank fit"
    nowhere = f"none up to 65,536; every rank needs {memory.dense_bytes / 1e9:.0f} GB outside the experts"
    if training.dense == "ddp":
        nowhere += ", which dense=fsdp2 cuts over them"
    return [
        "It fits." if fits else "It does not fit: fewer slots, more ranks, a smaller batch, offload=true, dense=fsdp2.",
        f"On {hardware.num_ranks} ranks {slots} (fewest that give every expert a place: {fewest}).",
        f"Smallest number of ranks: {ranks if ranks else nowhere}"
        + (f", with {min_slots(model.num_experts, ranks)} slots each." if ranks else "."),
    ]


def _step_table(scenario: Scenario, tokens: int, skew: float) -> Table:
    results = modelled_step(scenario, tokens, skew)
    table = Table(title=f"modelled step, ms; Zipf loads of skew {skew:g}")
    table.add_column("phase")
    for name in results:
        table.add_column(name, justify="right")
    for phase in PHASES:
        table.add_row(phase, *(f"{1e3 * result.phase_s[phase][0]:.2f}" for result in results.values()))
    table.add_row("step, one after the other", *(f"{1e3 * result.step_s[0]:.2f}" for result in results.values()))
    table.add_row("step, overlapped", *(overlapped_ms(result, ".2f") for result in results.values()))
    table.add_row("survival", *(f"{result.mean_survival:.1%}" for result in results.values()))
    return table
