"""The options of ``swiftmoe bench step``: ``conf/bench/step.yaml``, a recipe's ``bench``, the command line."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_swiftmoe.cli._mistakes import check_list
from lightning_swiftmoe.cli._peers.systems import parse

PROFILED_STEPS = 3


@dataclass(frozen=True)
class Options:
    """``conf/bench/step.yaml`` says what each is for.

    Raises:
        ValueError: a value that means nothing.
    """

    peers: list[str]
    warmup: int
    steps: int
    rounds: int
    batch_per_rank: int | None = None
    profile: bool = False
    stacks: bool = False
    reshard: bool = True
    text: bool = False
    target_loss: float | None = None
    limit_s: float = 180.0
    budget_s: float = 480.0
    output: str | None = None

    def __post_init__(self) -> None:
        for key, least in {"warmup": 0, "steps": 1, "rounds": 1}.items():
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
        if self.batch_per_rank is not None and not (isinstance(self.batch_per_rank, int) and self.batch_per_rank > 0):
            raise ValueError(f"batch_per_rank must be a positive integer or null, got {self.batch_per_rank!r}")
        for key in ("limit_s", "budget_s"):
            value = getattr(self, key)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{key} must be above zero, got {value!r}")
        if self.target_loss is not None and not isinstance(self.target_loss, (int, float)):
            raise ValueError(f"target_loss must be a number or null, got {self.target_loss!r}")
        for key in ("profile", "stacks", "reshard", "text"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be true or false, got {getattr(self, key)!r}")
        check_list("peers", self.peers)
        for entry in self.peers:
            parse(str(entry), 1)

    @classmethod
    def of(cls, config: DictConfig, own: list[str]) -> Options:
        """Defaults, under the recipe's, under those of the command line.

        Raises:
            ValueError: a name that is none of the options, or a bad value.
        """
        return cls(**merged_options("bench/step.yaml", config.bench, own, OPTION_NAMES))

    def in_processes_of_their_own(self, config: DictConfig) -> bool:
        """Whether this is ``_peers``' to run.

        Two older forms are not: one system alone, and DeepSpeed on gloo ranks beside our placement policies.
        """
        on_gloo = self.peers == ["deepspeed"] and config.cluster.accelerator == "cpu" and not self.profile
        return self.profile or (bool(self.peers) and not on_gloo)


OPTION_NAMES = {field.name for field in fields(Options)}


def merged_options(file: str, recipe: DictConfig, own: list[str], names: Collection[str]) -> dict[str, Any]:
    """The values of a file in ``conf``, under the recipe's, under those of the command line.

    Raises:
        ValueError: a name that is none of the options.
    """
    defaults = OmegaConf.create((files("lightning_swiftmoe.conf") / file).read_text())
    values = OmegaConf.to_container(OmegaConf.merge(defaults, recipe, OmegaConf.from_dotlist(own)))
    assert isinstance(values, dict)
    found = {str(name): value for name, value in values.items()}
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ValueError(f"bench.{unknown[0]} is unknown; there are {', '.join(sorted(names))}")
    return found
