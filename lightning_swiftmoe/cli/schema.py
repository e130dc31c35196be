"""Types of the configuration, so that Hydra refuses wrong ones and unknown keys when composing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lightning_swiftmoe.models import FolderModel, GPTConfig


def _thawed(name: str, config_class: type) -> type:
    """The same fields: OmegaConf cannot fill in frozen dataclasses. The frozen one checks the values."""
    types = get_type_hints(config_class)
    defaults = {f.name: MISSING if f.default is dataclasses.MISSING else f.default for f in fields(config_class)}
    return dataclasses.make_dataclass(
        name, [(key, types[key], field(default=default)) for key, default in defaults.items()]
    )


GPTConf = _thawed("GPTConf", GPTConfig)
FolderConf = _thawed("FolderConf", FolderModel)


@dataclass
class ClusterConf:
    """Where to run. ``hardware`` describes it to the cost model; ``virtual_ranks`` makes one process act as many."""

    accelerator: str = MISSING
    num_nodes: int = MISSING
    devices: Any = MISSING
    start_method: str = "popen"
    process_group_backend: str | None = None
    virtual_ranks: int | None = None
    hardware: dict[str, Any] | None = None


@dataclass
class PolicyConf:
    """A policy's name or ``_target_``, and its cadence in optimizer steps."""

    name: Any = "auto"
    every_n_steps: int = 1


@dataclass
class TrainConf:
    """The whole of ``swiftmoe train``. Groups that build objects are checked by what they build."""

    model: Any = MISSING  # of the schema that its file begins with
    cluster: ClusterConf = field(default_factory=ClusterConf)
    policy: PolicyConf = field(default_factory=PolicyConf)
    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    run_dir: str = MISSING
    resume: str | None = None
    restarts: int = 0
    ckpt_path: str | None = None
    seed: int = 0
    paper: str | None = None
    report: bool = True
    bench: dict[str, Any] = field(
        default_factory=dict
    )  # of `swiftmoe bench step` and `skew`: conf/bench/step.yaml, skew.yaml


def register() -> None:
    """Make the schemas known to Hydra, under the names the config files use."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConf)
    store.store(group="model", name="gpt_schema", node=GPTConf)
    store.store(group="model", name="folder_schema", node=FolderConf)
