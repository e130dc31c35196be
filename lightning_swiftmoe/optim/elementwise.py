"""Which optimizers may step on a flat interval of a parameter as if it were the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_KNOWN = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")

_REASONS = {
    "muon": "it orthogonalises whole matrices",
    "shampoo": "it preconditions with statistics of whole matrices",
    "soap": "it preconditions with statistics of whole matrices",
    "adafactor": "it factors second moments over rows and columns",
    "lamb": "it scales each layer by the norm of all its weights",
    "lars": "it scales each layer by the norm of all its weights",
    "lbfgs": "it needs inner products over all parameters",
    "sparseadam": "it needs sparse gradients",
}


def check_elementwise(optimizer: Optimizer) -> None:
    """Refuse an optimizer that would give other results on shards than on whole parameters.

    torch's element-wise optimizers pass by name; known others are refused by name; anything else is tried: two steps
    on a small matrix must equal the same steps on its flattened halves.

    Raises:
        ValueError: the optimizer cannot be sharded; says why and what to use.
    """
    for cls in type(optimizer).__mro__:
        for key, reason in _REASONS.items():
            if key in cls.__name__.lower():
                raise ValueError(_refusal(optimizer, reason))
    if is_known_elementwise(optimizer):
        return
    if _differs_on_halves(optimizer):
        raise ValueError(
            _refusal(optimizer, "two steps on a matrix and on its flattened halves gave different weights")
        )


def is_known_elementwise(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's, whose state is scalars and one number for each element."""
    return type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ in _KNOWN


def _refusal(optimizer: Optimizer, reason: str) -> str:
    return (
        f"{type(optimizer).__name__} cannot be sharded: {reason}, but every rank holds only a flat interval of each "
        f"expert. Use an element-wise optimizer ({', '.join(_KNOWN[:7])}, Lion, ...) for the experts"
    )


def _differs_on_halves(optimizer: Optimizer) -> bool:
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    whole = _steps(optimizer, group, [start], [[g] for g in grads])
    halves = _steps(optimizer, group, list(start.flatten().chunk(2)), [list(g.flatten().chunk(2)) for g in grads])
    return not torch.allclose(whole, halves, rtol=1e-12, atol=1e-12)


def _steps(optimizer: Optimizer, group: dict[str, Any], start: list[torch.Tensor], grads: list[Any]) -> torch.Tensor:
    params = [nn.Parameter(part.clone()) for part in start]
    try:
        trial = type(optimizer)([{**group, "params": params}], **optimizer.defaults)
        for grad in grads:
            for param, part in zip(params, grad, strict=True):
                param.grad = part.clone()
            trial.step()
    except Exception as error:
        raise ValueError(
            _refusal(optimizer, f"trying it on a small parameter failed ({type(error).__name__}: {error})")
        ) from error
    return torch.cat([param.detach().flatten() for param in params])
