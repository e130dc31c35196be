"""``swiftmoe checkpoint info PATH``: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from torch import Tensor

from lightning_swiftmoe.checkpoint.sums import named_tensors, what_we_added
from lightning_swiftmoe.cli._checkpoint import run_on_checkpoint
from lightning_swiftmoe.cli.tables import facts_table, make_console, size


def main(argv: Sequence[str]) -> int:
    """Print a table; exit status 1 for a file that cannot be loaded, 2 for a user's mistake."""
    return run_on_checkpoint(argv, "usage: swiftmoe checkpoint info PATH", info)


def info(path: Path, checkpoint: Mapping[str, Any]) -> int:
    """Print what is known of the checkpoint."""
    table = facts_table("what the checkpoint holds")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    where = f"{path}, {size(sum(file.stat().st_size for file in files))}"
    if path.is_dir():
        where += f" in {len(files)} files"
    for name, fact in {"path": where, **facts(checkpoint)}.items():
        table.add_row(name, escape(fact))
    make_console().print(table)
    return 0


def facts(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a checkpoint, in words."""
    weights = {k: v for k, v in checkpoint.get("state_dict", {}).items() if isinstance(v, Tensor)}
    found = {
        "step": str(checkpoint.get("global_step", "unknown")),
        "epoch": str(checkpoint.get("epoch", "unknown")),
        "weights": f"{_count(weights)} in {len(weights)} tensors",
        "experts": _experts(weights),
    }
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        found[f"optimizer {number}"] = _optimizer(state)
    found["made by"] = _maker(checkpoint)
    # Lightning adds settings: ModelCheckpoint{'monitor': None, ...}.
    found["callbacks"] = ", ".join(name.partition("{")[0] for name in checkpoint.get("callbacks", {})) or "none"
    return found


def _experts(weights: Mapping[str, Tensor]) -> str:
    """Those of our layers: ``NAME.experts.up_proj [E, rows, cols]``, perhaps with ``NAME.experts.up_proj_bias``."""
    matrices = {name: w for name, w in weights.items() if ".experts." in f".{name}" and w.dim() == 3}
    ours = {name: w for name, w in weights.items() if name.removesuffix("_bias") in matrices}
    sizes = {name.rpartition(".")[0]: len(weight) for name, weight in ours.items()}
    if not sizes:
        return "none"
    each = " or ".join(map(str, sorted(set(sizes.values()))))
    return f"{each} in each of {len(sizes)} layers; {_count(ours)}"


def _optimizer(state: Any) -> str:
    if not isinstance(state, Mapping):
        return "unknown"
    tensors = [(name.rpartition(".")[2], tensor) for name, tensor in named_tensors(state.get("state", {}))]
    kinds = ", ".join(dict.fromkeys(name for name, _ in tensors))
    total = size(sum(tensor.nbytes for _, tensor in tensors))
    return f"{total} for {len(state.get('state', {}))} parameters ({kinds})" if tensors else "no state"


def _maker(checkpoint: Mapping[str, Any]) -> str:
    version = checkpoint.get("pytorch-lightning_version", "of unknown version")
    num_ranks = what_we_added(checkpoint).get("num_ranks")
    return f"Lightning {version}" + (f", {num_ranks} rank(s)" if num_ranks else ", without our checksums")


def _count(tensors: Mapping[str, Tensor]) -> str:
    number, num_bytes = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    return f"{number:,} numbers, {size(num_bytes)}"
