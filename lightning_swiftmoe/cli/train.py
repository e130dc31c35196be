"""``swiftmoe train``: compose, say what will happen, train, say what happened."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from lightning_swiftmoe.cli.compose import prepare_hydra
from lightning_swiftmoe.cli.main import fail
from lightning_swiftmoe.cli.tables import outcome_table, plan_table
from lightning_swiftmoe.data.text import write_manifest
from lightning_swiftmoe.models import GPTConfig, GPTModule
from lightning_swiftmoe.virtual import VirtualCluster

_RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(argv: list[str]) -> int:
    """Run with Hydra overrides; a user's mistake is one line and status 2."""
    prepare_hydra()
    sys.argv = [sys.argv[0], *argv]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # one line is ours to write, from the real exception
    try:
        hydra.main(version_base="1.3", config_path="pkg://lightning_swiftmoe.conf", config_name="train")(train)()
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, ImportError, FileNotFoundError) as error:
        if os.environ.get("SWIFTMOE_TRACEBACK"):
            raise
        return fail(f"{first_cause(error)}\n(SWIFTMOE_TRACEBACK=1 shows where)")
    return 0


def first_cause(error: BaseException) -> str:
    """The message of the exception that started it: Hydra and launchers wrap what a constructor raised."""
    while error.__cause__ is not None and isinstance(error, (HydraException, OmegaConfBaseException)):
        error = error.__cause__
    return str(error).strip().split("\n\nAvailable")[0]


def train(config: DictConfig) -> None:
    """One training run of a composed configuration."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    environment = {key: os.environ.get(key) for key in _RANK_VARIABLES}
    if config.cluster.start_method == "fork":
        torch.set_num_threads(1)  # a forked pool of threads hangs
    try:
        run(config)
    finally:
        forget_ranks(environment)


def run(config: DictConfig) -> None:
    """Build everything, train, and print what happened."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    model = GPTConfig(**OmegaConf.to_container(config.model, resolve=True))  # type: ignore[arg-type]
    data = instantiate(config.data)
    trainer = build_trainer(config)
    console = Console() if rank_zero_only.rank == 0 else Console(quiet=True)
    console.print(plan_table(config, model, trainer.world_size))
    module: GPTModule = instantiate(config.module, model=model, optimizer=instantiate(config.optimizer))
    if rank_zero_only.rank == 0:
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
        write_manifest(data, run_dir / "manifest.json")
    trainer.fit(module, data)
    console.print(outcome_table(run_dir, data.unigram_entropy()))


def build_trainer(config: DictConfig) -> pl.Trainer:
    """The Trainer, with our strategy, or alone as a virtual cluster."""
    callbacks: dict[str, Any] = {name: instantiate(c) for name, c in config.callbacks.items() if c is not None}
    loggers = [instantiate(logger) for logger in config.logger.values() if logger is not None]
    if config.cluster.virtual_ranks is None:
        strategy = instantiate(config.strategy)
    else:
        strategy = "auto"
        callbacks["rebalancer"] = VirtualCluster(
            config.cluster.virtual_ranks,
            config.strategy.slots_per_rank,
            config.strategy.capacity_scope,
            policy=policy if isinstance(policy := config.policy.name, str) else instantiate(policy),
            every_n_steps=config.policy.every_n_steps,
            trace=config.callbacks.rebalancer.trace,
        )
    return instantiate(config.trainer, strategy=strategy, callbacks=list(callbacks.values()), logger=loggers or False)


def forget_ranks(environment: dict[str, str | None]) -> None:
    """Leave no trace of this run's ranks: the next job of a sweep starts its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for key, value in environment.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
