"""The user's module of a configuration, its data, and a Trainer for it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_swiftmoe import MoE
from tests.configs.configuration import Configuration
from tests.configs.optimizers import OPTIMIZERS, with_schedule

CLIPS: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "norm"},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


class Module(pl.LightningModule):
    """Dense in, MoE layers, dense out.

    The loss of a part of the batch is its sum of squared errors over its fair share of tokens: the mean over all parts
    is the loss of the whole batch, however uneven they are.

    Args:
        configuration: what to build.
        num_parts: of the batch; 1 for a process that sees all of it.
    """

    def __init__(self, configuration: Configuration, num_parts: int) -> None:
        super().__init__()
        c = self.configuration = configuration
        self.automatic_optimization = c.optimization == "automatic"
        self.fair_share = sum(c.tokens) / num_parts
        self.losses: list[float] = []
        self.validated: list[float] = []
        torch.manual_seed(c.seed)
        self.inp = nn.Linear(c.width, c.width)
        self.moes = nn.ModuleList([_moe(c) for _ in range(c.num_layers)])
        for index in range(1, c.num_layers):
            if c.tied == "layers":
                self.moes[index] = self.moes[0]
            elif c.tied == "experts":
                self.moes[index].experts = self.moes[0].experts
        self.out = nn.Linear(c.width, 1)
        self._freeze(c.frozen)

    def _freeze(self, part: str | None) -> None:
        words = {None: (), "router": ("router",), "up": ("up_proj",), "down": ("down_proj",), "experts": (".experts.",)}
        for name, param in self.named_parameters():
            if part == "dense":
                param.requires_grad_(".experts." in name)
            elif any(word in name and "shared" not in name for word in words[part]):
                param.requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.configuration.thaws and batch_idx == 1:
            self.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for moe in self.moes:
            x = x + self._layer(moe, torch.tanh(x))
        return self.out(x)

    def _layer(self, moe: nn.Module, x: Tensor) -> Tensor:
        kind = self.configuration.recomputed
        if kind is None or not self.training:
            return moe(x)
        return checkpoint(moe, x, use_reentrant=kind == "reentrant")

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self(x).squeeze(-1) - y).square().sum() / self.fair_share

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self._noted(batch)
        c = self.configuration
        for moe in self.moes:
            moe.aux_loss_scale = 1 / c.accumulate
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        if c.optimization == "turns":
            for optimizer in optimizers:
                self.toggle_optimizer(optimizer)
                self.manual_backward(self._noted(batch))
                self._step(optimizer)
                self.untoggle_optimizer(optimizer)
        else:
            self.manual_backward(self._noted(batch) / c.accumulate)
            if (batch_idx + 1) % c.accumulate and batch_idx + 1 < c.batches:
                return None  # the last batch of an epoch steps, as in automatic optimization
            for optimizer in optimizers:
                self._step(optimizer)
        schedules = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            if schedule is not None:
                schedule.step()
        return None

    def _noted(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def _step(self, optimizer: Any) -> None:
        """By hand."""
        if self.configuration.clip is not None:
            self.clip_gradients(optimizer, **CLIPS[self.configuration.clip])
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.validated.append(loss.item())
        self.log("val", loss, sync_dist=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        c = self.configuration
        params = {name: p for name, p in self.named_parameters() if p.requires_grad or c.thaws}
        parts = [list(params.values())]
        if c.optimization == "two":
            parts = [parts[0][::2], parts[0][1::2]]
        elif c.optimization in ("apart", "turns"):
            parts = [[p for name, p in params.items() if (".experts." in name) == experts] for experts in (False, True)]
        made = tuple(with_schedule(OPTIMIZERS[c.optimizer](part), c.schedule) for part in parts if part)
        return made if len(made) > 1 else made[0]


def _moe(c: Configuration) -> MoE:
    return MoE(
        c.width,
        c.ffn_size,
        c.num_experts,
        top_k=c.top_k,
        activation=c.activation,
        capacity_factor=c.capacity_factor,
        score=c.score,
        normalize_topk=c.normalize_topk,
        aux_loss_coef=c.aux_loss_coef,
        z_loss_coef=c.z_loss_coef,
        bias_update_rate=c.bias_update_rate,
        shared_ffn_size=c.shared_ffn_size,
    )


def batches(c: Configuration, rank: int | None = None) -> DataLoader:
    """This rank's part of every batch; None: all of it, in rank order."""
    generator = torch.Generator().manual_seed(c.seed + 1)
    x = torch.randn(c.batches, sum(c.tokens), c.width, generator=generator, dtype=torch.float64)
    x[..., 0] += 1  # a common direction, so that experts draw uneven loads
    pairs = list(zip(x, x.square().sum(-1).sin(), strict=True))
    if rank is not None:
        pairs = [tuple(whole.split(c.parts(i))[rank] for whole in pair) for i, pair in enumerate(pairs)]
    return DataLoader(pairs, batch_size=None)


def held_out(c: Configuration, rank: int | None = None) -> DataLoader | None:
    """Two batches to validate on."""
    return DataLoader(batches(c, rank).dataset[:2], batch_size=None) if c.validate_every else None


def trainer_options(c: Configuration) -> dict[str, Any]:
    """Of the Trainer, whoever trains."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": c.epochs,
        "precision": "64-true",
        "logger": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    }
    if c.optimization == "automatic":
        options["accumulate_grad_batches"] = c.accumulate
        options.update(CLIPS[c.clip] if c.clip else {})
    if c.validate_every:
        options["val_check_interval"] = c.validate_every
        options["check_val_every_n_epoch"] = None
    return options
