"""Who has parts of a user's Parameters inside ``fit``: ``HostedExperts`` of experts, ``ShardedDense`` of the rest."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class ShardHolder(Protocol):
    """Some Parameters of one module, by name in it, of which every rank holds a part.

    Attributes:
        originals: the user's own.
        parameters: those that take their places in ``fit``; the same where this rank holds all.
        shapes: of the whole Parameters.
    """

    originals: dict[str, nn.Parameter]
    parameters: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]

    @property
    def state_device(self) -> torch.device:
        """Where Parameters and their state are."""
        ...

    def local(self, key: str) -> Tensor:
        """This rank's part of the weights, without a gradient; shares the Parameter's memory."""
        ...

    def part(self, key: str, canonical: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in the shape of ``local(key)``."""
        ...

    def wrapped(self, key: str, local: Tensor) -> Tensor:
        """``local``, in the shape of ``local(key)``, as users see it."""
        ...

    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The whole tensor of which this rank has ``shard``; None where it goes elsewhere. Collective."""
        ...

    def gather_for_checkpoint(self, key: str, shard: Tensor) -> Tensor | None:
        """``gather`` to the host of rank 0 of the job; None elsewhere."""
        ...


def full_name(prefix: str, key: str) -> str:
    """Name in the user's module of what a part of it, ``prefix``, calls ``key``."""
    return f"{prefix}.{key}" if prefix else key
