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
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf, read_write
from torch import nn

from lightning_swiftmoe._compat import SIGTERMException, trainer_callbacks
from lightning_swiftmoe.arguments import check_count
from lightning_swiftmoe.callback import ExpertRebalancer
from lightning_swiftmoe.checkpoint.io import WholeCheckpointIO
from lightning_swiftmoe.checkpoint.periodic import checkpoints_in, step_of
from lightning_swiftmoe.cli import restarts, resume
from lightning_swiftmoe.cli._hydra import run_task
from lightning_swiftmoe.cli._models import model_of
from lightning_swiftmoe.cli._options import check_options
from lightning_swiftmoe.cli.progress import ShortProgressBar
from lightning_swiftmoe.cli.report import write_report_of
from lightning_swiftmoe.cli.tables import make_console, outcome_table, plan_table
from lightning_swiftmoe.data.corpus_data import CorpusData, check_batch_size, write_manifest
from lightning_swiftmoe.layers.model_sizes import ModelDescription
from lightning_swiftmoe.models.language_module import LanguageModule
from lightning_swiftmoe.optim.elementwise import check_elementwise
from lightning_swiftmoe.strategy import check_precision
from lightning_swiftmoe.virtual import VirtualCluster

_RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Some of these is set on every rank of a job on several nodes, whoever started it.
_STARTED = ("SLURM_NTASKS", "WORLD_SIZE", "MASTER_ADDR", "NODE_RANK", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# Whichever of Lightning's two packages was imported last, in this process, speaks for both.
_TALKATIVE = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")

# Said on every run, and nothing a user could do about it.
_NOISE = (
    ".*does not have many workers.*",
    ".*treespec, LeafSpec.*",
    ".*The dirpath has changed from .*",  # every run has a folder of its own
    ".*Experiment logs directory .* exists and is not empty.*",  # config.yaml is written there first
)


def main(argv: list[str]) -> int:
    """Run with Hydra overrides; a user's mistake is one line and status 2, a signal 128 and its number."""
    try:
        number = restarts.asked_for(argv)
        argv = restarts.restarted(argv)
        folder = resume.folder_of(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if number:
        return restarts.supervise(argv, number)
    # Hydra's own files belong there too.
    place = [] if folder is None else [f"hydra.run.dir={folder}"]
    return run_task("train", train, [*argv, *place])


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
    checkpoint = None if config.ckpt_path is None else Path(config.ckpt_path)
    if config.resume is not None:
        if checkpoint is not None:
            raise ValueError(f"resume={config.resume} goes on from that run's newest checkpoint: leave ckpt_path out")
        checkpoint = resume.newest_checkpoint(Path(config.resume))
        config = resume.resumed_config(config, Path(config.resume).absolute(), HydraConfig.get().overrides.task)
        if 0 <= config.trainer.max_steps <= step_of(checkpoint):
            raise ValueError(
                f"resume={config.resume}: the run is at step {step_of(checkpoint)} of trainer.max_steps = "
                f"{config.trainer.max_steps}; set it to more to go on"
            )
    check_options(config)
    run_dir = Path(config.run_dir)
    model = model_of(config)
    description = model.describe()
    data: CorpusData = instantiate(config.data)
    optimizer = instantiate(config.optimizer)
    trainer = build_trainer(config)
    console = make_console(quiet=not trainer.is_global_zero)
    plan = plan_table(config, description.sizes, trainer.world_size)
    if trainer.is_global_zero:
        resume.make_folder(run_dir)
    check_fit(config, description, data, optimizer, trainer)
    for name, remark in {**description.remarks, **data.remarks()}.items():
        plan.add_row(name, remark)
    console.print(plan)
    module: LanguageModule = instantiate(config.module, model=model, optimizer=optimizer)
    if trainer.is_global_zero:
        with resume.only_run_in(run_dir, resumes=config.resume is not None):
            write_manifest(data, run_dir / "manifest.json")
            OmegaConf.save(config, run_dir / resume.CONFIG, resolve=True)
            if config.resume is not None and checkpoint is not None:
                continue_loggers(trainer, checkpoint)
            fit(trainer, module, data, checkpoint, run_dir)
    else:
        fit(trainer, module, data, checkpoint, run_dir)
    if trainer.is_global_zero:
        lacking = write_report_of(run_dir) if config.report else None
        console.print(outcome_table(run_dir, data.unigram_entropy()))
        if lacking:
            console.print(lacking)


def fit(trainer: pl.Trainer, module: LanguageModule, data: CorpusData, checkpoint: Path | None, run_dir: Path) -> None:
    """Train; where a signal ends it, say how to go on."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except SIGTERMException:
        saved = checkpoints_in(run_dir / resume.CHECKPOINTS)
        if trainer.is_global_zero and saved:
            print(f"stopped by a signal, saved as {saved[-1].name}: swiftmoe train resume={run_dir} goes on")
        raise


def continue_loggers(trainer: pl.Trainer, checkpoint: Path) -> None:
    """Files of metrics keep what they have of the steps before the checkpoint."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            resume.continue_metrics(logger, step_of(checkpoint))


def check_fit(
    config: DictConfig, model: ModelDescription, data: CorpusData, optimizer: Any, trainer: pl.Trainer
) -> None:
    """Find what would fail on every rank while there is one process to say so.

    Raises:
        ValueError: a batch the ranks cannot share or the data cannot fill, sequences too long for the model or the
            text, tokens that the model does not have, conversations that it cannot keep apart, an optimizer with wrong
            arguments or one that cannot be sharded, a precision that experts do not have, no checkpoint, a trace
            that cannot be written, a virtual cluster on the meta device.
    """
    check_count("trainer.accumulate_grad_batches", config.trainer.accumulate_grad_batches)
    if config.ckpt_path is not None and not Path(config.ckpt_path).exists():
        raise ValueError(f"ckpt_path = {config.ckpt_path} is not there: give a file in a run's checkpoints folder")
    check_batch_size(data.batch_size, config.cluster.virtual_ranks or trainer.world_size)
    check_data(model, data)
    try:
        trial = optimizer([nn.Parameter(torch.zeros(2, 2))])
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"optimizer {config.optimizer._target_}: {str(error).splitlines()[0]}") from error
    if config.cluster.virtual_ranks is not None and config.module.get("on_meta"):
        raise ValueError("module.on_meta = true needs ranks that share experts; a virtual cluster is one process")
    if config.cluster.virtual_ranks is None:
        check_precision(trainer.precision)
        if not config.strategy.get("trust_optimizer"):
            check_elementwise(trial)
    if trainer.is_global_zero:
        for callback in trainer_callbacks(trainer):
            if isinstance(callback, ExpertRebalancer):
                callback.check_trace()


def check_data(model: ModelDescription, data: CorpusData) -> None:
    """Whether a model can be trained on it.

    Raises:
        ValueError: sequences, tokens or conversations that it cannot read, or too few of them.
    """
    longest, tokens = model.sizes.max_seq_len, model.sizes.vocab_size
    if longest is not None and data.seq_len > longest:
        raise ValueError(f"data.seq_len = {data.seq_len} is more than the {longest} that the model can read")
    if data.vocab_size > tokens:
        raise ValueError(
            f"the tokenizer has {data.vocab_size:,} tokens, and the model knows {tokens:,}: they do not belong "
            "together, set data.tokenizer to the folder of the model's own"
        )
    if data.packs and model.why_no_packing is not None:
        raise ValueError(f"conversations cannot share a sequence: {model.why_no_packing}")
    number = len(data.dataset("train"))  # type: ignore[arg-type]
    if number < data.batch_size:
        raise ValueError(
            f"data.batch_size = {data.batch_size}, but the training split has {number} sequence(s) of {data.seq_len} "
            "tokens: choose a smaller batch or shorter sequences"
        )


def build_trainer(config: DictConfig) -> pl.Trainer:
    """The Trainer, with our strategy, or alone as a virtual cluster.

    Raises:
        ValueError: expert groups of a virtual cluster, GPUs or nodes that are not there.
    """
    check_machine(config)
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
            strategy.rule.capacity_scope,
            strategy.rule.split,
            strategy.transient_copies,
            policy=policy if isinstance(policy := config.policy.name, str) else instantiate(policy),
            every_n_steps=config.policy.every_n_steps,
            trace=config.callbacks.rebalancer.trace,
        )
        strategy = "auto"
    if config.trainer.enable_progress_bar and not any(isinstance(c, ProgressBar) for c in callbacks.values()):
        callbacks["progress"] = ShortProgressBar()
    options: dict[str, Any] = {"strategy": strategy, "callbacks": list(callbacks.values()), "logger": loggers or False}
    if strategy == "auto" and config.trainer.get("plugins") is None:
        options["plugins"] = [WholeCheckpointIO()]  # ours has it
    if config.trainer.get("default_root_dir") is None:
        options["default_root_dir"] = config.run_dir
    return instantiate(config.trainer, **options)


def check_machine(config: DictConfig) -> None:
    """Whether there is what the Trainer is told to run on.

    Raises:
        ValueError: several nodes that nobody has started, or more GPUs than there are.
    """
    accelerator, devices, num_nodes = config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes
    if num_nodes > 1 and not any(name in os.environ for name in _STARTED):
        raise ValueError(
            f"num_nodes = {num_nodes}, but nobody has started ranks on other nodes. Under SLURM: run `srun swiftmoe "
            "train ...` in a job with one task for each GPU, or add -m hydra/launcher=submitit_slurm (pip install "
            "'lightning-swiftmoe[slurm]'); elsewhere use torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    if accelerator not in ("gpu", "cuda") or torch.backends.mps.is_available():
        return
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"accelerator = {accelerator}, but torch finds no GPU here: choose cluster=local_cpu")
    if isinstance(devices, int) and devices > count:
        raise ValueError(f"devices = {devices}, but this machine has {count} GPU(s): set cluster.devices={count}")


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
