"""Lightning's Trainer: our layer without a strategy, under DDP, and under our strategy."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import open_dict
from torch import Tensor

from lightning_swiftmoe.callback import ExpertRebalancer
from lightning_swiftmoe.cli._peers.folder_model import FolderLM, fill_in
from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter
from lightning_swiftmoe.layers.moe import moe_layers
from lightning_swiftmoe.models import GPT, FolderModel
from lightning_swiftmoe.precision import clipping_fused
from lightning_swiftmoe.step import Step


class BenchModule(pl.LightningModule):
    """The loss, the optimizer, and nothing that logs.

    Args:
        job: this rank.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.meta_seed = job.config.seed
        self.loss: Tensor | None = None
        self.net: GPT | FolderLM = FolderLM(job.model) if isinstance(job.model, FolderModel) else job.build_gpt()
        self._loss_of = torch.compile(self.net.loss) if job.config.module.get("compile") else self.net.loss

    def on_train_start(self) -> None:
        """Only now: a strategy's set-up runs layers with tokens of its own."""
        if isinstance(self.net, GPT):
            self.job.replay_routing(self.net)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss in nats per token."""
        loss = self._loss_of(batch)
        self.loss = loss.detach()
        return loss

    def configure_optimizers(self) -> Any:
        """Without a schedule."""
        return self.job.build_optimizer(self)


class Batches:
    """An iterable that Lightning does not take for several loaders, as it would a list.

    Args:
        batches: in order.
    """

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class Ticks(pl.Callback):
    """Tells the meter of every step."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In front of a step."""
        self.meter.before_step(batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind it."""
        assert isinstance(pl_module, BenchModule)
        assert pl_module.loss is not None
        self.meter.after_step(batch_idx, pl_module.loss)


class Loads(pl.Callback):
    """Tells the meter how even the ranks' loads were in every step of ours."""

    def __init__(self, rebalancer: ExpertRebalancer, meter: Meter) -> None:
        self.rebalancer, self.meter = rebalancer, meter

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The engine is there."""
        assert self.rebalancer.engine is not None
        self.rebalancer.engine.observers.append(self._keep)

    def _keep(self, step: Step) -> None:
        self.meter.imbalances.append(statistics.fmean(layer.rank_imbalance for layer in step.layers))


def run(job: Job, meter: Meter) -> None:
    """Train."""
    module = BenchModule(job)
    if isinstance(job.model, FolderModel) and not job.name.startswith("ours"):
        fill_in(module, module.meta_seed, job.device)
    trainer = make_trainer(job, meter)
    meter.survival = lambda: survival(trainer, module)
    trainer.fit(module, Batches(job.batches()))


def make_trainer(job: Job, meter: Meter) -> pl.Trainer:
    """The configured Trainer with the system's strategy and callbacks."""
    config = job.config
    with open_dict(config):
        config.trainer.devices = job.num_ranks
        config.trainer.max_steps = job.plan.total_steps
        config.trainer.enable_progress_bar = False
        config.trainer.enable_checkpointing = config.callbacks.get("checkpoint") is not None
    callbacks: list[pl.Callback] = []
    if config.trainer.enable_checkpointing:
        callbacks.append(instantiate(config.callbacks.checkpoint, dirpath=str(job.folder / "checkpoints")))
    if job.name.startswith("ours"):
        with open_dict(config):
            config.callbacks.rebalancer.trace = None
        rebalancer = instantiate(config.callbacks.rebalancer)
        callbacks += [rebalancer, Loads(rebalancer, meter)]
    callbacks.append(Ticks(meter))  # behind the save and the rebalancing, which are parts of their step
    trainer: pl.Trainer = instantiate(config.trainer, strategy=strategy_of(job), callbacks=callbacks, logger=False)
    # As ours does by itself: Lightning alone would refuse to clip the gradients of the optimizer that all have.
    trainer.strategy.precision_plugin = clipping_fused(trainer.precision_plugin)
    return trainer


def strategy_of(job: Job) -> Any:
    """What ``Trainer(strategy=...)`` gets."""
    if job.name == "none":
        return "auto"
    if job.name == "ddp":
        backend = job.config.cluster.process_group_backend
        # Every parameter takes part in every step, and gradients need no second copy.
        return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True, static_graph=True)
    return instantiate(job.config.strategy)


def survival(trainer: pl.Trainer, module: BenchModule) -> float | None:
    """Our strategy logs it; a layer alone counts what it routed and what it processed."""
    known = logged(trainer, "moe/token_survival")
    if known is not None:
        return known
    loads = [load for layer in moe_layers(module).values() if (load := layer._load) is not None]
    if not loads:
        return None
    processed = sum(float(load.rank_load.sum()) for load in loads)
    return processed / sum(float(load.counts.sum()) for load in loads)


def logged(trainer: pl.Trainer, name: str) -> float | None:
    """A metric of the last step, where somebody logged it."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)
