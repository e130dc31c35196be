"""A long fit and many short ones, which look at their own process as they go on."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_swiftmoe.checkpoint.periodic import PeriodicCheckpoint
from tests.endurance.usage import Usage
from tests.jobs import Job, Net, data, our_trainer


class Forgets(Net):
    """Keeps no loss of every step: that would be growth of the test's own."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Samples(pl.Callback):
    """Takes a sample of this process at the end of every ``every_n_steps``-th step."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.seen: list[Usage] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.every_n_steps == 0:
            self.seen.append(Usage.now())


def job_of(folder: Path, steps: int, save_every: int, *callbacks: pl.Callback) -> Job:
    """Replicas that move on every step, a trace, and checkpoints."""
    return Job(
        slots=4,
        steps=steps,
        module=Forgets,
        callbacks=lambda: [*callbacks, PeriodicCheckpoint(folder / "checkpoints", save_every, None)],
        rebalancer={"trace": str(folder / "trace.npy.gz")},
        trainer={"enable_checkpointing": True},
    )


def long_fit(folder: Path, steps: int, save_every: int, sample_every: int) -> list[Usage]:
    """On every rank: one fit; samples of this rank, ``sample_every`` steps apart."""
    samples = Samples(sample_every)
    _fit(job_of(folder, steps, save_every, samples))
    return samples.seen


def many_fits(folder: Path, fits: int, steps: int, holds: bool = False) -> list[Usage]:
    """On every rank: fits with Trainers and modules of their own; a sample of this rank after each.

    Args:
        folder: for files.
        fits: how many.
        steps: of each.
        holds: keep every Trainer, as a program that leaks does.
    """
    seen, held = [], []
    for _ in range(fits):
        trainer = _fit(job_of(folder, steps, save_every=steps // 2))
        held += [trainer] if holds else []
        del trainer
        dist.barrier()  # rank 0 may still be saving
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "checkpoints")
        dist.barrier()
        gc.collect()  # a Trainer and its module name each other
        seen.append(Usage.now())
        dist.barrier()  # a rank that is over closes its end of the connection
    return seen


def _fit(job: Job) -> pl.Trainer:
    trainer = our_trainer(job)
    trainer.fit(job.module(job), data(job, dist.get_rank(), dist.get_world_size()))
    return trainer
