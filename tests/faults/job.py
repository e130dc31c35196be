"""One job of a trial: trains a small MoE with checkpoints, and one of its ranks may be killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.checkpoint.periodic import PeriodicCheckpoint
from tests.jobs import Job, Net, data, sgd

# Where in a step a rank is killed.
PHASES = ("batch start", "forward", "before backward", "after backward", "optimizer step", "batch end", "saving")
BEHIND_THE_VOTE = "behind the vote"  # in the optimizer's own step, which others may have taken already


@dataclass(frozen=True)
class Plan:
    """What a job does.

    Args:
        folder: of its checkpoints.
        num_ranks: N.
        start_method: ``"popen"``, ``"fork"`` or ``"spawn"``.
        steps: optimizer steps in all.
        save_every: steps between checkpoints.
        killed: rank, step and phase; None: nobody.
        delay_ms: for "saving": after how long.
        resume: a checkpoint; None: from the start.
        redundancy: owners of every shard.
        expert_parallel_size: of the strategy.
        meets_in_copy: all ranks do after every backward, in one to pageable memory.
        transport: in fp32, and on GPUs but for ``"gloo"``; empty: ranks have no GPU, and compute in fp64.
    """

    folder: str
    num_ranks: int
    start_method: str
    steps: int = 8
    save_every: int = 2
    killed: tuple[int, int, str] | None = None
    delay_ms: float = 0
    resume: str | None = None
    redundancy: int = 1
    expert_parallel_size: int | None = None
    meets_in_copy: bool = False
    transport: str = ""

    @property
    def job(self) -> Job:
        """The same for all plans in fp32 and for all others, so that all end with the same weights."""
        job = Job(num_experts=6, slots=6, batch=24, steps=self.steps)
        # AdamW takes rounding in small gradients for a direction.
        return replace(job, precision="32-true", optimizer=sgd) if self.transport else job


class Killer(pl.Callback):
    """Kills its own process where the plan says so."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def reached(self, trainer: pl.Trainer, phase: str) -> None:
        """This rank is in ``phase`` of the step that follows ``trainer.global_step``."""
        if self.plan.killed == (trainer.global_rank, trainer.global_step, phase):
            kill()

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.reached(trainer, BEHIND_THE_VOTE))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reached(trainer, "batch start")
        moe = pl_module.moes[1]
        moe.register_forward_pre_hook(lambda *_: self.reached(trainer, "forward"))

    def on_before_backward(self, trainer, pl_module, loss):
        self.reached(trainer, "before backward")

    def on_after_backward(self, trainer, pl_module):
        self.reached(trainer, "after backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.reached(trainer, "optimizer step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.reached(trainer, "batch end")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.plan.killed == (trainer.global_rank, trainer.global_step, "saving"):
            threading.Timer(self.plan.delay_ms / 1e3, kill).start()


class Module(Net):
    """With a loader that knows which part of a batch is this rank's, whoever started the rank."""

    meets_in_copy = False

    def on_after_backward(self):
        if self.meets_in_copy:
            met = torch.ones((), device=self.device)
            torch.distributed.all_reduce(met)
            met.cpu()

    def train_dataloader(self):
        return data(self.job, self.global_rank, self.trainer.world_size)


def kill() -> None:
    """As the kernel does when memory runs out: nothing else runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(plan: Plan) -> None:
    """Train by ``plan``, in a process that Lightning may start again for further ranks."""
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        accelerator="gpu" if plan.transport in ("nccl", "symmetric") else "cpu",
        devices=plan.num_ranks,
        max_steps=plan.steps,
        precision=plan.job.precision,
        logger=False,
        use_distributed_sampler=False,
        default_root_dir=plan.folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Killer(plan), PeriodicCheckpoint(plan.folder, plan.save_every, None, keep=2)],
        strategy=SwiftMoEStrategy(
            slots_per_rank=plan.job.slots,
            timeout=60 if plan.transport else 20,  # many jobs that import CUDA at once start slowly
            start_method=plan.start_method,
            redundancy=plan.redundancy,
            expert_parallel_size=plan.expert_parallel_size,
            transport=plan.transport or "auto",
        ),
    )
    module = Module(plan.job)
    module.meets_in_copy = plan.meets_in_copy
    trainer.fit(module, ckpt_path=plan.resume)


if __name__ == "__main__":
    values = json.loads(Path(sys.argv[1]).read_text())
    killed = values.pop("killed")
    run(Plan(**values, killed=tuple(killed) if killed else None))
