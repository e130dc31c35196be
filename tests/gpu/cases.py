"""What the ranks are asked to do: fits whose weights, steps and metrics come back.

Every function here runs inside a rank of ``RankPool`` and takes and returns what pickle can carry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_swiftmoe import ExpertRebalancer
from lightning_swiftmoe.virtual import VirtualCluster
from tests.gpu.rank_pool import DEVICE, NUM_RANKS
from tests.jobs import Batches, InEvalMode, Job, Net, data, make_trainer, our_trainer, sgd

HOPPER = {"ffn_size": 128, "activation": "swiglu"}  # with a width of 64: what the Hopper kernels take
TRANSPORTS = ("nccl", "symmetric") if DEVICE == "cuda" else ("gloo",)


@dataclass
class GpuJob(Job):
    """A job as in ``tests.jobs``, with what else these tests vary.

    Args:
        transport: of the strategy.
        empty_rank: has no tokens in any batch.
        validates: runs two validation batches every second step.
        uneven: only the first rank runs the second of them.
        on_device: batches are on the rank's device before the first step.
        sizes: tokens of this rank in each batch; None: its part of ``batch``.
    """

    num_experts: int = 5
    slots: int | str = 3
    optimizer: Any = sgd
    precision: str = "32-true"
    batch: int = 96
    steps: int = 9  # CUDA graphs are recorded in the first four
    transport: str = "auto"
    empty_rank: int | None = None
    validates: bool = False
    uneven: bool = False
    on_device: bool = False
    sizes: list[int] | None = None


@dataclass
class Outcome:
    """What one rank has to say after a fit."""

    weights: dict[str, Tensor]
    steps: list[Any]
    metrics: dict[str, float]


class Checkpointed(Net):
    """Activation checkpointing around each MoE layer."""

    reentrant = False

    def forward(self, x):
        x = self.inp(x)
        for moe in self.moes:
            x = x + checkpoint(moe, torch.tanh(x), use_reentrant=self.reentrant)
        return self.out(x)


class ReentrantCheckpointed(Checkpointed):
    reentrant = True


class Twice(Net):
    """Each MoE layer runs twice before the first of its backwards."""

    def forward(self, x):
        x = self.inp(x)
        for moe in self.moes:
            x = x + moe(torch.tanh(x)) + moe(torch.sin(x))
        return self.out(x)


class EditsBetween(Net):
    """Gradients of experts are looked at and scaled after each micro-batch."""

    def on_after_backward(self):
        for moe in self.moes:
            for param in moe.experts.parameters():
                param.grad.mul_(0.8)


class Compiled(Net):
    """The loss is one graph, the exchange of tokens in it; where ranks plan on the host it has breaks."""

    def __init__(self, job):
        super().__init__(job)
        torch.compiler.reset()  # graphs of earlier fits in this process count towards torch's limit
        options = {} if DEVICE == "cuda" else {"backend": "aot_eager"}
        self.compiled = torch.compile(super().loss, fullgraph=DEVICE == "cuda", **options)

    def loss(self, batch):
        return self.compiled(batch)


class CompiledInEvalMode(Compiled, InEvalMode):
    pass


class Starved(Net):
    """The router never chooses the last two experts; needs ``bias_update_rate``."""

    def __init__(self, job):
        super().__init__(job)
        for moe in self.moes:
            moe.router.expert_bias[-2:] = -10.0


class OneSided(Net):
    """The router chooses the first two experts only; needs ``bias_update_rate``."""

    def __init__(self, job):
        super().__init__(job)
        for moe in self.moes:
            moe.router.expert_bias[2:] = -10.0


class ShortOfOne(Net):
    """What a mean over several ranks makes of a loss that one of them has no tokens for."""

    def loss(self, batch):
        return super().loss(batch) * (NUM_RANKS - 1) / NUM_RANKS


class Recorder(pl.Callback):
    """Every step as the engine tells of it."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def on_train_start(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if isinstance(callback, ExpertRebalancer):
                callback.engine.observers.append(self.steps.append)


def on_gpus() -> bool:
    """Whether this rank has a GPU."""
    return dist.get_backend() == "nccl"


def placed() -> dict[str, Any]:
    """Trainer arguments that put this rank where it belongs."""
    return {"accelerator": "gpu", "devices": [dist.get_rank()]} if on_gpus() else {}


def strategy_options(job: GpuJob) -> dict[str, Any]:
    """Arguments of the strategy."""
    return {"transport": job.transport, **job.strategy}


def fit(job: GpuJob, callbacks: list[Any] | None = None, ckpt_path: str | None = None) -> Outcome:
    """On every rank: train with the strategy."""
    recorder = Recorder()
    extra = [recorder, *(callbacks or [])]
    job.callbacks, job.strategy = (lambda: extra), strategy_options(job)
    return _train(job, our_trainer(job, **_validation(job), **placed()), recorder, ckpt_path)


def fit_alone(job: GpuJob) -> Outcome:
    """In this process, without the strategy."""
    recorder = Recorder()
    return _train(job, make_trainer(job, callbacks=[recorder], **_validation(job), **placed()), recorder, alone=True)


def fit_virtually(job: GpuJob, num_ranks: int, where: dict[str, Any]) -> Outcome:
    """In this process, as so many ranks would.

    Args:
        where: Trainer arguments; none for the CPU.
    """
    recorder = Recorder()
    virtual = VirtualCluster(num_ranks, job.slots, policy=job.policy, **job.strategy)
    trainer = make_trainer(job, callbacks=[recorder, virtual], **where)
    return _train(job, trainer, recorder, alone=True)


def _train(
    job: GpuJob, trainer: pl.Trainer, recorder: Recorder, ckpt_path: str | None = None, *, alone: bool = False
) -> Outcome:
    module = job.module(job)
    rank, num_ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    count = 1 if job.uneven and rank > 0 else 2
    val = Validation(data(job, rank, num_ranks), count) if job.validates else None
    trainer.fit(module, batches(job, rank, num_ranks), val, ckpt_path=ckpt_path)
    weights = {name: value.cpu() for name, value in module.state_dict().items()}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name == "val"}
    return Outcome(weights, recorder.steps, metrics)


def batches(job: GpuJob, rank: int, num_ranks: int) -> Batches:
    """This rank's batches; with an empty rank the others share nothing with it."""
    if job.empty_rank is not None:
        whole = data(job)
        keep = 0 if rank == job.empty_rank else job.batch
        return Batches(whole.x[:, :keep], whole.y[:, :keep])
    part = data(job, rank, num_ranks)
    if job.on_device and on_gpus():
        part = Batches(part.x.cuda(), part.y.cuda())
    if job.sizes is not None:
        part = Batches(_cut(part.x, job.sizes), _cut(part.y, job.sizes))
    return part


def _cut(batches: Tensor, sizes: list[int]) -> Any:
    return [batch[:size] for batch, size in zip(batches, sizes, strict=True)]


class Validation:
    """The first training batches."""

    def __init__(self, source: Batches, count: int) -> None:
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self._source.x[: self._count], self._source.y[: self._count], strict=True))


def _validation(job: GpuJob) -> dict[str, Any]:
    return {"val_check_interval": 2, "num_sanity_val_steps": 1} if job.validates else {}
