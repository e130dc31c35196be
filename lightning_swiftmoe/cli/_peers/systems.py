"""Which systems can stand side by side, and how each is asked for.

An entry of ``peers`` is ``NAME`` or ``NAME+KEY=VALUE+...``: overrides of ``swiftmoe train`` for this system alone, as
in ``ours_ep+strategy.offload_optimizer=true``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_swiftmoe.cli._models import model_of

# Name: the module in this package that trains it.
PEERS = {
    "none": "with_lightning",
    "ours1": "with_lightning",
    "ours": "with_lightning",
    "ours_all": "with_lightning",
    "ours_ep": "with_lightning",
    "ddp": "with_lightning",
    "fsdp2": "fsdp2",
    "torchtitan": "titan",
    "deepspeed": "deepspeed_moe",
    "deepspeed_cap1": "deepspeed_moe",
}
EXTRAS = {"torchtitan": "torchtitan", "deepspeed": "deepspeed", "deepspeed_cap1": "deepspeed"}
ON_ONE_RANK = ("none", "ours1")
WITH_SLOTS = ("ours1", "ours_all", "ours_ep")


@dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
        label: the entry as written; the row's name.
        name: one of ``PEERS``.
        num_ranks: processes, each with its own GPU.
        overrides: of the configuration, for this system alone.
    """

    label: str
    name: str
    num_ranks: int
    overrides: dict[str, Any] = field(default_factory=dict)

    def missing(self) -> str | None:
        """What to install, where a package lacks."""
        package = EXTRAS.get(self.name)
        if package is None or find_spec(package) is not None:
            return None
        return f"not installed: pip install 'lightning-swiftmoe[{package}]'"

    def configure(self, config: DictConfig) -> DictConfig:
        """``config`` for this system's ranks: a copy, everything resolved."""
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))  # type: ignore[assignment]
        with open_dict(config):
            config.cluster.devices = self.num_ranks
            config.cluster.start_method = config.strategy.start_method = "popen"  # Lightning must not fork ranks itself
            if self.name in WITH_SLOTS:
                num_experts = model_of(config).describe().sizes.num_experts
                config.strategy.slots_per_rank = slots_of(self.name, num_experts, self.num_ranks)
            if not any(key.startswith("callbacks.checkpoint.") for key in self.overrides):
                config.callbacks.checkpoint = None  # a save in the timed block is for who asks for it
            for key, value in self.overrides.items():
                OmegaConf.update(config, key, value, force_add=True)
        return config


def slots_of(name: str, num_experts: int, num_ranks: int) -> int:
    """Slots of a variant of ours, one of ``WITH_SLOTS``."""
    return -(-num_experts // num_ranks) if name == "ours_ep" else num_experts


def parse(entry: str, num_ranks: int) -> System:
    """The system of one entry of ``peers``.

    Raises:
        ValueError: unknown, or an override without a value.
    """
    name, *overrides = entry.split("+")
    if name not in PEERS:
        raise ValueError(f"peers must be among {', '.join(PEERS)}, got {name!r}")
    lacking = [word for word in overrides if "=" not in word]
    if lacking:
        raise ValueError(f"an override in peers is written +KEY=VALUE, got {lacking[0]!r} in {entry!r}")
    values = OmegaConf.from_dotlist(overrides)
    flat = {word.split("=")[0]: OmegaConf.select(values, word.split("=")[0]) for word in overrides}
    return System(entry, name, 1 if name in ON_ONE_RANK else num_ranks, flat)


def expand(entries: list[str], slots_per_rank: Any) -> list[str]:
    """``ours`` without a number of slots stands for two: every expert on every rank, and no replica.

    ``deepspeed`` stands for two as well: without drops, whose losses must agree, and at capacity 1.
    """
    found: list[str] = []
    for entry in entries:
        name, plus, overrides = entry.partition("+")
        names = [name]
        if name == "ours" and slots_per_rank == "auto" and "strategy.slots_per_rank" not in overrides:
            names = ["ours_all", "ours_ep"]
        if name == "deepspeed":
            names = ["deepspeed", "deepspeed_cap1"]
        found += [each + plus + overrides for each in names]
    return list(dict.fromkeys(found))
