"""``swiftmoe train``: compose, say what will happen, train, say what happened."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, OmegaConf, read_write
from torch import nn

from lightning_swiftmoe.cli._hydra import run_task
from lightning_swiftmoe.cli.progress import ShortProgressBar
from lightning_swiftmoe.cli.report import write_report_of
from lightning_swiftmoe.cli.tables import make_console, outcome_table, plan_table
from lightning_swiftmoe.data.loader import Windows
from lightning_swiftmoe.data.text import TextData, check_batch_size, write_manifest
from lightning_swiftmoe.models import GPTConfig, GPTModule
from lightning_swiftmoe.optim.elementwise import check_elementwise
from lightning_swiftmoe.virtual import VirtualCluster

_RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Whichever of Lightning's two packages was imported last, in this process, speaks for both.
_TALKATIVE = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")

# Said on every run, and nothing a user could do about it.
_NOISE = (
    ".*does not have many workers.*",
    ".*treespec, LeafSpec.*",
    ".*Experiment logs directory .* exists and is not empty.*",  # config.yaml is written there first
)


def main(argv: list[str]) -> int:
    """Run with Hydra overrides; a user's mistake is one line and status 2."""
    return run_task("train", train, argv)


def train(config: DictConfig) -> None:
    """One training run of a composed configuration."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)  # hardware lists, tips
    environment = {key: os.environ.get(key) for key in _RANK_VARIABLES}
    name_this_job_to_children()
    if config.cluster.start_method == "fork":
        torch.set_num_threads(1)  # a forked pool of threads hangs
    try:
        run(config)
    finally:
        forget_ranks(environment)


def run(config: DictConfig) -> None:
    """Build everything, train, and print what happened."""
    run_dir = Path(config.run_dir)
    model = GPTConfig(**OmegaConf.to_container(config.model, resolve=True))  # type: ignore[arg-type]
    data: TextData = instantiate(config.data)
    optimizer = instantiate(config.optimizer)
    trainer = build_trainer(config)
    console = make_console(quiet=not trainer.is_global_zero)
    plan = plan_table(config, model, trainer.world_size)
    check_fit(config, model, data, optimizer, trainer)
    console.print(plan)
    module: GPTModule = instantiate(config.module, model=model, optimizer=optimizer)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_manifest(data, run_dir / "manifest.json")
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    trainer.fit(module, data)
    if trainer.is_global_zero:
        lacking = write_report_of(run_dir) if config.report else None
        console.print(outcome_table(run_dir, data.unigram_entropy()))
        if lacking:
            console.print(lacking)


def check_fit(config: DictConfig, model: GPTConfig, data: TextData, optimizer: Any, trainer: pl.Trainer) -> None:
    """Find what would fail on every rank while there is one process to say so.

    Raises:
        ValueError: a batch the ranks cannot share, sequences too long for the model or the text, an optimizer with
            wrong arguments or one that cannot be sharded.
    """
    check_batch_size(data.batch_size, config.cluster.virtual_ranks or trainer.world_size)
    if data.seq_len > model.max_seq_len:
        raise ValueError(f"data.seq_len = {data.seq_len} is more than model.max_seq_len = {model.max_seq_len} can read")
    Windows(data.tokens("train"), data.seq_len)
    try:
        trial = optimizer([nn.Parameter(torch.zeros(2, 2))])
    except TypeError as error:
        raise ValueError(f"optimizer {config.optimizer._target_}: {error}") from error
    if config.cluster.virtual_ranks is None and not config.strategy.get("trust_optimizer"):
        check_elementwise(trial)


def build_trainer(config: DictConfig) -> pl.Trainer:
    """The Trainer, with our strategy, or alone as a virtual cluster.

    Raises:
        ValueError: expert groups of a virtual cluster.
    """
    callbacks: dict[str, Any] = {name: instantiate(c) for name, c in config.callbacks.items() if c is not None}
    loggers = [instantiate(logger) for logger in config.logger.values() if logger is not None]
    strategy = instantiate(config.strategy)
    if config.cluster.virtual_ranks is not None:
        if strategy.expert_parallel_size is not None:
            raise ValueError(
                f"strategy.expert_parallel_size = {strategy.expert_parallel_size}, but a virtual cluster is one expert "
                "group: leave it at null, or train on ranks that exist"
            )
        callbacks["rebalancer"] = VirtualCluster(
            config.cluster.virtual_ranks,
            strategy.slots_per_rank,
            strategy.capacity_scope,
            policy=policy if isinstance(policy := config.policy.name, str) else instantiate(policy),
            every_n_steps=config.policy.every_n_steps,
            trace=config.callbacks.rebalancer.trace,
        )
        strategy = "auto"
    if config.trainer.enable_progress_bar and not any(isinstance(c, ProgressBar) for c in callbacks.values()):
        callbacks["progress"] = ShortProgressBar()
    return instantiate(config.trainer, strategy=strategy, callbacks=list(callbacks.values()), logger=loggers or False)


def name_this_job_to_children() -> None:
    """Lightning starts further ranks from ``sys.argv``, which in a sweep names all jobs and another folder."""
    hydra = HydraConfig.get()
    sys.argv = [sys.argv[0], *hydra.overrides.task, "hydra.mode=RUN"]
    with read_write(hydra):  # type: ignore[arg-type]
        hydra.run.dir = hydra.runtime.output_dir


def forget_ranks(environment: dict[str, str | None]) -> None:
    """Leave no trace of this run's ranks: the next job of a sweep starts its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for key, value in environment.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
