"""Optimizers and schedules to draw from, by name.

Where a division by a moment could turn a rounding error into a step, ``eps`` is large enough to keep it one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, OneCycleLR

from tests.strategy.test_elementwise import Lion

EPS = 1e-4


def decay_groups(params: Sequence[Parameter]) -> Optimizer:
    """Weight decay for matrices only, and another rate."""
    matrices = {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.3}
    rest = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr": 0.01}
    return torch.optim.AdamW([group for group in (matrices, rest) if group["params"]], lr=0.03, eps=EPS)


def group_of_each(params: Sequence[Parameter]) -> Optimizer:
    """Rates by depth."""
    return torch.optim.SGD([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)], momentum=0.5)


OPTIMIZERS: dict[str, Callable[[Sequence[Parameter]], Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.03, momentum=0.9, nesterov=True, foreach=True),
    "adamw": partial(torch.optim.AdamW, lr=0.03, weight_decay=0.1, eps=EPS),
    "amsgrad": partial(torch.optim.Adam, lr=0.03, amsgrad=True, eps=EPS),
    "fused": partial(torch.optim.AdamW, lr=0.03, fused=True, eps=EPS),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, eps=EPS, momentum=0.5, centered=True),
    "lion": partial(Lion, lr=0.01),
    "decay_groups": decay_groups,
    "group_of_each": group_of_each,
}

# Their steps are as far off as gradients are.
KEEP_ROUNDING = ("sgd", "momentum", "nesterov", "adagrad", "group_of_each")

SCHEDULES: dict[str, tuple[str, Callable[[Optimizer], LRScheduler]]] = {
    "exponential": ("step", partial(ExponentialLR, gamma=0.5)),
    "warmup": ("step", partial(LambdaLR, lr_lambda=lambda step: min(1.0, step / 2))),
    "one_cycle": ("step", partial(OneCycleLR, max_lr=0.05, total_steps=100, cycle_momentum=False)),
    "by_epoch": ("epoch", partial(ExponentialLR, gamma=0.3)),
}


def with_schedule(optimizer: Optimizer, schedule: str | None) -> Any:
    """What ``configure_optimizers`` returns."""
    if schedule is None:
        return optimizer
    interval, make = SCHEDULES[schedule]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": interval}}
