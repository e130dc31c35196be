"""What a run will do, and what it did, as tables."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_swiftmoe.callback import LOGGED_PHASES
from lightning_swiftmoe.cluster import ClusterShape, resolve_group_size, resolve_slots
from lightning_swiftmoe.layers.model_sizes import ModelSizes
from lightning_swiftmoe.report.runs import policy_of

_SHOWN = {
    "moe/token_survival": ("token survival", ".1%"),
    "moe/rank_imbalance": ("rank imbalance, max/mean", ".2f"),
    "moe/replicas_moved": ("replicas moved per step", ".2f"),
    "moe/tokens_per_s": ("tokens per second", ",.0f"),
}
_KEPT = ("config.yaml", "metrics.csv", "manifest.json", "trace.npy.gz", "checkpoints", "model", "report.html")
_WEIGHT_BYTES = {"bf16-mixed": 2, "bf16-true": 2, "64-true": 8}


def make_console(quiet: bool = False) -> Console:
    """As wide as the terminal; in a file or a pipe, where nobody says how wide, 120 columns."""
    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    return console


def plan_table(config: DictConfig, model: ModelSizes, num_ranks: int) -> Table:
    """Sizes of the model and of what each rank holds, before anything runs.

    Raises:
        ValueError: too few slots, or expert groups that do not divide the ranks.
    """
    virtual = config.cluster.virtual_ranks
    num_ranks = virtual or num_ranks
    group_size = resolve_group_size(config.strategy.get("expert_parallel_size"), num_ranks)
    slots = resolve_slots(config.strategy.slots_per_rank, model.num_experts, group_size)
    ClusterShape(group_size, slots, model.num_experts)
    layers = model.num_moe_layers
    weight_bytes = _WEIGHT_BYTES.get(config.trainer.precision, 4)
    master_bytes = max(4, weight_bytes)
    table = facts_table("what will run")
    experts, active = model.num_expert_params, model.num_active_params
    table.add_row("parameters", f"{model.num_params:,} ({experts:,} in experts; {active:,} active per token)")
    capacity = "dropless" if model.capacity_factor is None else f"capacity factor {model.capacity_factor}"
    table.add_row("MoE", f"{layers} layers, {model.num_experts} experts, top-{model.top_k}, {capacity}")
    groups = "" if group_size == num_ranks else f", {num_ranks // group_size} expert groups of {group_size}"
    table.add_row("ranks", f"{num_ranks}{' (virtual, one process)' if virtual else ''}{groups}, {slots} slots each")
    table.add_row("policy", f"{policy_of(config)}, every {config.policy.every_n_steps} step(s)")
    table.add_row("tokens", _split_of(config, model.capacity_factor is not None))
    resident = layers * min(slots, model.num_experts) * model.num_params_of_expert
    is_cut = config.strategy.get("dense") == "fsdp2" and not virtual
    dense = size(model.num_dense_params * master_bytes / (num_ranks if is_cut else 1))
    table.add_row("dense weights per rank", f"{dense}, cut" if is_cut else dense)
    table.add_row("expert weights per rank", size(resident * weight_bytes))
    place = "on the host" if config.strategy.offload_optimizer else "on the device"
    if config.strategy.optimizer_state == "bound":
        place += ", of the experts it hosts"
    shard_bytes = experts * master_bytes / group_size
    if config.strategy.get("redundancy") == 2 and 1 < num_ranks == group_size and not virtual:
        shard_bytes *= 2
        place += ", those it is the second owner of included"
    table.add_row("expert shards per rank", f"{size(shard_bytes)} {place}")
    if "Adam" in config.optimizer._target_:
        table.add_row("expert moments per rank", f"{size(2 * shard_bytes)} {place}")
    return table


def _split_of(config: DictConfig, has_capacity: bool) -> str:
    """Over the replicas of an expert, and who has a capacity."""
    exact = config.strategy.get("split") == "exact"
    text = f"split {'on the exact load' if exact else 'evenly'} over replicas"
    copies = config.strategy.get("transient_copies")
    if copies:
        text += f", a rank borrows {'experts' if copies == 'auto' else f'up to {copies} experts'}"
    if not has_capacity:
        return text
    scopes = {"cluster": "an expert", "rank": "an expert on each rank", "pooled": "a rank"}
    return f"{text}; {scopes[config.strategy.capacity_scope]} has a capacity"


def outcome_table(run_dir: Path, unigram_entropy: float) -> Table:
    """Loss, survival, imbalance, speed and bytes of a finished run, from its metrics file."""
    columns = read_metrics(run_dir / "metrics.csv")
    table = facts_table("what happened")
    loss = columns.get("train/loss", [])
    if loss:
        table.add_row("loss", f"{loss[0]:.3f} first, {loss[-1]:.3f} last (unigram entropy {unigram_entropy:.3f} nats)")
    for name, (label, form) in _SHOWN.items():
        if values := columns.get(name):
            mean = sum(values) / len(values)
            table.add_row(label, f"{mean:{form}} on average, {values[-1]:{form}} last")
    for phase in LOGGED_PHASES:
        if (sent := columns.get(f"moe/bytes_{phase}")) and sum(sent):
            spent = columns[f"moe/ms_{phase}"]
            table.add_row(
                f"{phase} phase", f"{size(sum(sent) / len(sent))} and {sum(spent) / len(spent):.1f} ms a step (rank 0)"
            )
    inside = run_dir.is_absolute() and run_dir.is_relative_to(Path.cwd())
    table.add_row("run folder", str(run_dir.relative_to(Path.cwd()) if inside else run_dir))
    kept = [name for name in _KEPT if (run_dir / name).exists()]
    table.add_row("", ", ".join(kept))
    return table


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a CSV logger's file without their gaps; empty where there is no file."""
    columns: dict[str, list[float]] = {}
    if path.exists():
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value:
                        columns.setdefault(name, []).append(float(value))
    return columns


def size(num_bytes: float) -> str:
    """Bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def facts_table(title: str) -> Table:
    """Names and what is known of them, a line each."""
    table: Any = Table(title=title, show_header=False, title_justify="left", title_style="bold", box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table
