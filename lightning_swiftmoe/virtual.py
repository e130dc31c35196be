"""A virtual cluster: one process that drops tokens as ``N`` ranks would, to study policies without the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_swiftmoe._compat import trainer_callbacks
from lightning_swiftmoe.arguments import check_count
from lightning_swiftmoe.callback import ExpertRebalancer, only_rebalancer
from lightning_swiftmoe.cluster import ClusterShape, resolve_slots
from lightning_swiftmoe.engine import ExpertEngine
from lightning_swiftmoe.layers.dispatchers import VirtualDispatcher
from lightning_swiftmoe.layers.layer import MoELayer
from lightning_swiftmoe.parallel.find_layers import find_layers
from lightning_swiftmoe.placement import (
    CapacityScope,
    Placement,
    Split,
    TokenRule,
    token_rule,
    try_policy,
    with_chosen_copies,
)


class VirtualCluster(ExpertRebalancer):
    """Takes the place of ``SwiftMoEStrategy`` and ``ExpertRebalancer`` in a Trainer with one process.

    Every batch counts as split into ``num_ranks`` equal contiguous parts. Capacities, drops, loads, placements, metrics
    and trace are those of the real cluster; nothing is sent, so bytes and times are zero.

    Args:
        num_ranks: ranks to act as.
        slots_per_rank, capacity_scope, split: as for ``SwiftMoEStrategy``.
        transient_copies: as for ``SwiftMoEStrategy``; ``"auto"`` as where ranks reach each other's memory.
        **kwargs: as for ``ExpertRebalancer``.

    Raises:
        ValueError: a bad argument; on ``fit``, too few slots, a policy that returns no placement, another rebalancer,
            or a Trainer with several processes.
    """

    def __init__(
        self,
        num_ranks: int,
        slots_per_rank: int | str = "auto",
        capacity_scope: CapacityScope = "pooled",
        split: Split = "exact",
        transient_copies: int | Literal["auto"] = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        resolve_slots(slots_per_rank, 1, 1)
        check_count("num_ranks", num_ranks)
        self.num_ranks, self.slots_per_rank = num_ranks, slots_per_rank
        self.rule = token_rule(capacity_scope, split, transient_copies)
        self._chooses_copies = transient_copies == "auto"
        self._virtual: ExpertEngine | None = None
        self._last_step = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"a virtual cluster runs in one process, but the Trainer has {trainer.world_size}")
        only_rebalancer(trainer_callbacks(trainer))
        moes = find_layers(pl_module)
        clusters = {name: self._cluster_of(moe) for name, moe in moes.items()}
        rule = self.rule
        if self._chooses_copies:
            rule, line = with_chosen_copies(rule, clusters.values())
            say = rank_zero_info if rule.transient_copies else rank_zero_warn
            say(line)
        layers = []
        for name, cluster in clusters.items():
            try_policy(self.rebalancing.policy, cluster)
            layers.append(VirtualLayer(name, moes[name], cluster, self.state.first_placement(name, cluster), rule))
        self._virtual = ExpertEngine(layers, self.rebalancing, self.state)
        self.follow(self._virtual)

    def _cluster_of(self, moe: MoELayer) -> ClusterShape:
        slots = resolve_slots(self.slots_per_rank, moe.num_experts, self.num_ranks)
        return ClusterShape(self.num_ranks, slots, moe.num_experts, self.rule.caps_experts(moe.capacity_factor))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._virtual is not None
        self._last_step = trainer.global_step
        self._virtual.begin_forward(training=True)
        for moe in find_layers(pl_module).values():
            moe.aux_loss_scale = 1 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._virtual is not None
        if trainer.global_step > self._last_step:
            self._virtual.stepped()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Weights are sent before validation too, to where the last step has put the experts.
        if self._virtual is not None:
            self._virtual.begin_forward(training=False)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.leave()
        self._virtual = None
        for moe in find_layers(pl_module).values():
            moe.detach()


class VirtualLayer:
    """One MoE layer that drops as a cluster would.

    Args:
        name: in the user's module.
        moe: the layer.
        cluster: the shape it acts as.
        placement: the first one.
        rule: which assignments are kept, and who processes them.
    """

    def __init__(self, name: str, moe: MoELayer, cluster: ClusterShape, placement: Placement, rule: TokenRule) -> None:
        self.name = name
        self.moes: Mapping[str, MoELayer] = {name: moe}
        self.cluster = cluster
        self.placement = placement
        self._dispatcher = VirtualDispatcher(placement, rule)
        moe.attach(self._dispatcher)
        self._experts = moe.experts.module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._experts.parameters()).device

    def adopt(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take the placement of the next step."""
        self.placement = placement

    def start_weights(self) -> None:
        """Every expert is here: only the drops change."""
        self._dispatcher.placement = self.placement
