"""One set of experts inside the strategy, with every MoE layer that uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.layers.dispatchers import LocalDispatcher
from lightning_swiftmoe.layers.layer import MoELayer
from lightning_swiftmoe.layers.load import counts_as_training
from lightning_swiftmoe.parallel.communicator import Pending
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts, Locals
from lightning_swiftmoe.placement import Placement


class ExpertLayer:
    """What the engine drives: a placement, residents for computing, and the exchanges that keep them fresh.

    Args:
        name: of the first MoE layer that uses the experts, in the user's module.
        moes: those layers by name; several where experts are tied.
        cluster: the shape they are placed on.
        hosted: the experts.

    Attributes:
        before_tokens: called with a MoE layer's name and its tokens before these are sent anywhere.
        before_forward: called before residents are handed out.
        local_dispatchers: those of a single rank, which hold a placement of their own.
        captures: called with every new placement, for forwards that users captured in a CUDA graph.
    """

    def __init__(self, name: str, moes: Mapping[str, MoELayer], cluster: ClusterShape, hosted: HostedExperts) -> None:
        self.name = name
        self.moes: Mapping[str, MoELayer] = dict(moes)
        self.cluster = cluster
        self.hosted = hosted
        self.placement = hosted.placement
        self.before_tokens: Callable[[str, Tensor], None] = lambda name, x: None
        self.before_forward: Callable[[], None] = lambda: None
        self.local_dispatchers: list[LocalDispatcher] = []
        self.captures: list[Callable[[], None]] = []

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.hosted.communicator.device

    def residents(self, *, with_gradients: bool = False) -> Locals:
        """Weights to compute a forward with; the engine is told, so that it sends them if need be. Late edits count.

        Args:
            with_gradients: the forward's will come, though autograd is off at the moment.
        """
        if counts_as_training(self.hosted.experts.training or with_gradients):
            self.hosted.count_forward()
        self.before_forward()
        if self.hosted.edited:
            self.start_weights()
        return self.hosted.residents()

    def adopt(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Choose the placement of the next weight phase; bound state moves there."""
        self.hosted.move_state(placement, states)
        self.placement = placement

    def start_weights(self) -> None:
        """Weight phase, under ``placement``."""
        for dispatcher in self.local_dispatchers:
            dispatcher.placement = self.placement
        self.hosted.start_weights(self.placement)
        if self.captures:
            self.hosted.finish_weights()  # a replay does not ask for them
            for refresh in self.captures:
                refresh()

    def start_gradients(self) -> Pending[Locals]:
        """Gradient phase."""
        return self.hosted.start_gradients()
