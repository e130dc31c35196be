"""A virtual cluster: one process that drops tokens as ``N`` ranks would, to study policies without the ranks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_swiftmoe.callback import ExpertRebalancer
from lightning_swiftmoe.cluster import ClusterShape, resolve_slots
from lightning_swiftmoe.exchange import PHASES, Traffic
from lightning_swiftmoe.layers.dispatchers import LocalDispatcher, VirtualDispatcher
from lightning_swiftmoe.layers.load import loads_to_host
from lightning_swiftmoe.layers.moe import moe_layers
from lightning_swiftmoe.placement.capacity import CapacityScope, check_scope
from lightning_swiftmoe.step import Step


class VirtualCluster(ExpertRebalancer):
    """Takes the place of ``SwiftMoEStrategy`` and ``ExpertRebalancer`` in a Trainer with one process.

    Every batch counts as split into ``num_ranks`` equal contiguous parts. Capacities, drops, loads, placements, metrics
    and trace are those of the real cluster; nothing is sent, so bytes and times are zero.

    Args:
        num_ranks: ranks to act as.
        slots_per_rank, capacity_scope: as for ``SwiftMoEStrategy``.
        **kwargs: as for ``ExpertRebalancer``.

    Raises:
        ValueError: a bad argument; on ``fit``, too few slots, or a Trainer with several processes.
    """

    def __init__(
        self,
        num_ranks: int,
        slots_per_rank: int | str = "auto",
        capacity_scope: CapacityScope = "cluster",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        resolve_slots(slots_per_rank, 1, 1)
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
        check_scope(capacity_scope)
        self.num_ranks, self.slots_per_rank, self.capacity_scope = num_ranks, slots_per_rank, capacity_scope
        self._clusters: dict[str, ClusterShape] = {}
        self._last_step = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"a virtual cluster runs in one process, but the Trainer has {trainer.world_size}")
        for name, moe in moe_layers(pl_module).items():
            slots = resolve_slots(self.slots_per_rank, moe.num_experts, self.num_ranks)
            cluster = ClusterShape(self.num_ranks, slots, moe.num_experts, moe.capacity_factor is not None)
            self._clusters[name] = cluster
            moe.dispatcher = VirtualDispatcher(self.first_placement(name, cluster), self.capacity_scope)
            moe.managed = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._last_step = trainer.global_step
        for moe in moe_layers(pl_module).values():
            moe.aux_loss_scale = 1 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._last_step:
            self._end_virtual_step(pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for moe in moe_layers(pl_module).values():
            moe.dispatcher = LocalDispatcher(moe.num_experts)
            moe.managed, moe.aux_loss_scale = False, 1.0

    def _end_virtual_step(self, pl_module: LightningModule) -> None:
        layers = moe_layers(pl_module)
        loads = loads_to_host([moe.pop_load(self.num_ranks) for moe in layers.values()])
        steps = []
        for (name, moe), load in zip(layers.items(), loads, strict=True):
            step = self.decide(name, moe, load, self._clusters[name])
            moe.dispatcher.placement = step.next_placement
            steps.append(step)
        self.end_step(Step(tuple(steps), {phase: Traffic() for phase in PHASES}))
