"""A small MoE and one way to train it, on one process without a strategy or on several ranks with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from lightning_swiftmoe import ExpertRebalancer, MoE, SwiftMoEStrategy
from tests.ranks import Ranks

WIDTH = 6


class Net(pl.LightningModule):
    """Dense in, two MoE layers, dense out; squared error."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        torch.manual_seed(7)
        self.inp = nn.Linear(job.width, job.width)
        moe = {"ffn_size": 5, "num_experts": job.num_experts, "top_k": job.top_k, **job.moe}
        self.moes = nn.ModuleList([MoE(job.width, **moe) for _ in range(2)])
        self.out = nn.Linear(job.width, 1)
        self.losses: list[float] = []
        self.seen: list[Any] = []  # what a test wants compared besides the weights

    def forward(self, x):
        x = self.inp(x)
        for moe in self.moes:
            x = x + moe(torch.tanh(x))
        return self.out(x)

    def loss(self, batch):
        x, y = batch
        error = (self(x).squeeze(-1) - y).square()
        return error.mean() if error.numel() else error.sum()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return self.job.optimizer(self)


class InEvalMode(Net):
    """As ``from_pretrained`` returns models; Lightning leaves them so. No auxiliary loss, and biases stay."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.eval()


class SaveAt(pl.Callback):
    """A checkpoint in the middle of ``fit``, where slots are in force; training goes on."""

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def two_groups(module: Net, cls: Callable[..., Any], **kwargs: Any) -> torch.optim.Optimizer:
    """Down projections and biases in a group of their own, with another learning rate."""
    names = dict(module.named_parameters())
    slow = [p for n, p in names.items() if "down" in n or "bias" in n]
    rest = [p for n, p in names.items() if not ("down" in n or "bias" in n)]
    return cls([{"params": rest}, {"params": slow, "lr": kwargs["lr"] / 3}], **kwargs)


def adamw(module: Net) -> torch.optim.Optimizer:
    return two_groups(module, torch.optim.AdamW, lr=0.05, weight_decay=0.1)


def sgd(module: Net) -> torch.optim.Optimizer:
    return two_groups(module, torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclass
class Job:
    """What to train. ``batch`` is per step of all ranks together and must divide by the ranks."""

    num_experts: int = 5
    slots: int | str = 2
    top_k: int = 2
    policy: Any = "random"
    optimizer: Callable[[Net], torch.optim.Optimizer] = adamw
    precision: str = "64-true"
    batch: int = 24
    steps: int = 5
    moe: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Any]] = list
    module: type[Net] = Net
    rebalancer: dict[str, Any] = field(default_factory=dict)
    width: int = WIDTH


class Batches:
    """The steps' batches in order; goes on where a checkpoint left off."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y, self.next = x, y, 0

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self):
        if self.next == len(self.x):
            self.next = 0  # Lightning never asks for one more than there are
        while self.next < len(self.x):
            self.next += 1
            yield self.x[self.next - 1], self.y[self.next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def data(job: Job, rank: int = 0, num_ranks: int = 1) -> Batches:
    """The rank's part of every global batch: contiguous, so that one process sees the concatenation."""
    generator = torch.Generator().manual_seed(3)
    accumulate = job.trainer.get("accumulate_grad_batches", 1)
    num_batches = job.steps * accumulate
    x = torch.randn(num_batches, job.batch, job.width, generator=generator, dtype=torch.float64)
    x[..., 0] += 2  # a common direction, so that experts draw uneven loads
    y = x.square().sum(-1).sin()
    if job.precision != "64-true":
        x, y = x.float(), y.float()
    part = slice(rank * job.batch // num_ranks, (rank + 1) * job.batch // num_ranks)
    return Batches(x[:, part], y[:, part])


def make_trainer(job: Job, strategy: Any = "auto", **kwargs: Any) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": job.steps,
        "precision": job.precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(strategy=strategy, **{**options, **job.trainer, **kwargs})


def our_trainer(job: Job, **kwargs: Any) -> pl.Trainer:
    strategy = SwiftMoEStrategy(slots_per_rank=job.slots, **{"timeout": 30, **job.strategy})
    callbacks = [*job.callbacks(), ExpertRebalancer(job.policy, **job.rebalancer)]
    return make_trainer(
        job, strategy, num_nodes=dist.get_world_size(), plugins=[Ranks()], callbacks=callbacks, **kwargs
    )


def train(job: Job, ckpt_path: str | None = None, save: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
    """On every rank: train with the strategy; the state dict of the user's module afterwards."""
    trainer, module = our_trainer(job, **kwargs), job.module(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module.state_dict()


def train_alone(job: Job, ckpt_path: str | None = None, save: str | None = None) -> dict[str, torch.Tensor]:
    """In this process, with no strategy."""
    trainer, module = make_trainer(job, callbacks=job.callbacks()), job.module(job)
    if job.precision == "64-true":
        module.double()  # stock strategies load a checkpoint first and convert afterwards, which rounds to fp32
    for moe in module.moes:
        moe.aux_loss_scale = 1 / job.trainer.get("accumulate_grad_batches", 1)
    trainer.fit(module, data(job), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module.state_dict()


def largest_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative norm of a difference over all weights; NaN where there is one.

    Biases of loss-free balancing are left out: without a strategy the last step's is still to come.
    """
    assert a.keys() == b.keys()
    keys = [key for key in a if not key.endswith("expert_bias")]
    errors = [(a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-30) for k in keys]
    # Python's own max passes over a NaN that does not come first.
    return torch.stack([error.double() for error in errors]).max().item()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, wherever its parts are; collective inside ``fit``."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
