"""What one process makes of a configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_swiftmoe.cluster import ClusterShape, resolve_slots
from lightning_swiftmoe.layers.experts import Experts
from lightning_swiftmoe.layers.load import in_backward
from lightning_swiftmoe.layers.moe import moe_layers
from lightning_swiftmoe.layers.router import Routing
from lightning_swiftmoe.placement import Placement, uniform
from lightning_swiftmoe.placement.exact_split import exact_split
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.placement.transient_copies import with_copies
from lightning_swiftmoe.step import LayerStep, Step
from lightning_swiftmoe.virtual import VirtualCluster
from tests.configs.configuration import Configuration
from tests.configs.module import Module, batches, held_out, trainer_options
from tests.strategy.test_bytes import Recorder

Table = list[list[int]]


@dataclass
class Counted:
    """One set of experts in one step: assignments.

    Args:
        routed: ``[W, E]`` by every rank, or ``[1, E]`` by all of them.
        processed: ``[W]`` by every rank, or ``[1]`` by all of them.
        next_placement: the one that was decided; None where nobody decides.
    """

    routed: IntArray
    processed: IntArray
    next_placement: Placement | None = None


@dataclass
class Outcome:
    """What a process has to say after a fit.

    Args:
        weights: of the module.
        losses: of its part of every batch.
        validated: the same of validation batches.
        counted: by step and set of experts.
        steps: records of the engine, on a rank.
        refused: the sentence with which ``fit`` ended before the first batch.
        failed: how it ended otherwise.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validated: list[float] = field(default_factory=list)
    counted: list[list[Counted]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    refused: str = ""
    failed: str = ""


def cluster_of(c: Configuration) -> ClusterShape:
    """The ranks that share one set of experts."""
    slots = resolve_slots(c.slots, c.num_experts, c.sharers)
    caps_experts = c.capacity_factor is not None and c.capacity_scope != "pooled"
    return ClusterShape(c.sharers, slots, c.num_experts, caps_experts)


def truth(c: Configuration, steps: Sequence[Step]) -> Outcome:
    """In this process, without the strategy.

    * Without capacity and biases: plain layers, which know nothing of ranks.
    * Where ``VirtualCluster`` can act as these ranks it does, and decides placements by itself.
    * Else tokens are dropped as by ranks that place experts as ``steps`` say.

    Args:
        c: the configuration.
        steps: what a rank recorded.
    """
    module = Module(c, 1).double()
    virtual = is_virtual(c)
    recorder, watch = Recorder(), Watch(c, steps)
    callbacks: list[pl.Callback] = [watch]
    if virtual:
        options = {"policy": c.make_policy(), "every_n_steps": c.every_n_steps}
        callbacks = [
            recorder,
            VirtualCluster(c.num_ranks, c.slots, c.capacity_scope, c.split, c.transient_copies, **options),
        ]
    trainer = pl.Trainer(callbacks=callbacks, **trainer_options(c))
    trainer.fit(module, batches(c), held_out(c))
    counted = [list(map(of_record, step.layers)) for step in recorder.steps] if virtual else watch.counted
    return Outcome(module.state_dict(), module.losses, module.validated, counted)


def is_virtual(c: Configuration) -> bool:
    """Whether ``VirtualCluster`` can act as the ranks: in one group, with equal parts, and no experts are shared."""
    one_group, equal = c.sharers == c.num_ranks, len(set(c.tokens)) == 1
    return c.capacity_factor is not None and one_group and equal and (c.tied is None or c.num_layers == 1)


def of_record(layer: LayerStep) -> Counted:
    """From an engine's record."""
    return Counted(layer.counts, layer.rank_load, layer.next_placement)


class Watch(pl.Callback):
    """Counts what layers do in a step; where there is something to drop or to balance, attaches ``Parts``."""

    def __init__(self, c: Configuration, steps: Sequence[Step]) -> None:
        self.c, self.steps = c, steps
        self.counted: list[list[Counted]] = []
        self._is_plain = c.capacity_factor is None and not c.bias_update_rate
        self._first = np.concatenate([uniform(cluster_of(c)).table] * (c.num_ranks // c.sharers))
        self._step_before = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._moes = list(moe_layers(pl_module).values())
        self._sets = list(dict.fromkeys(moe.experts for moe in self._moes))
        self._parts = [Parts(self.c) for _ in self._moes]
        for moe, part in zip(self._moes, self._parts, strict=True):
            if self._is_plain:
                moe.router.register_forward_hook(part.count)
            else:
                moe.attach(part)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_before = trainer.global_step
        self._place(batch_idx)
        if not self._is_plain:
            for moe in self._moes:
                moe.aux_loss_scale = 1 / trainer.accumulate_grad_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step_before:
            return
        found = [(moe, *part.pop()) for moe, part in zip(self._moes, self._parts, strict=True)]
        for moe, routed, _ in found:
            moe.router.update_bias(torch.from_numpy(routed.sum(axis=0)))
        sharing = [[(routed, done) for moe, routed, done in found if moe.experts is experts] for experts in self._sets]
        self.counted.append([Counted(sum(routed for routed, _ in of), sum(done for _, done in of)) for of in sharing])

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._place(batch_idx)

    def _place(self, batch: int) -> None:
        """Tokens of that batch, and experts as the ranks placed them after as many steps."""
        for moe, part in zip(self._moes, self._parts, strict=True):
            index, done = self._sets.index(moe.experts), len(self.counted)
            part.tokens, part.placement = self.c.parts(batch), Placement(self._first, self.c.num_experts)
            if 0 < done <= len(self.steps):
                part.placement = self.steps[done - 1].layers[index].next_placement


class Parts:
    """A dispatcher of one process, whose batch counts as the parts of ranks in expert groups.

    What those would drop is dropped, assignment by assignment.
    """

    num_processes = 1

    def __init__(self, c: Configuration) -> None:
        self.c = c
        self.tokens: Sequence[int] = ()
        self.placement: Placement | None = None  # of all ranks
        self._routed: Any = 0
        self._processed: Any = 0

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, capacity_factor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, idx = self.c, routing.topk_idx.clone()
        parts = idx.split(list(self.tokens))  # views: what is dropped there is dropped in idx
        counts = np.stack([np.bincount(part.flatten().numpy(), minlength=c.num_experts) for part in parts])
        processed = []
        assert self.placement is not None
        for first in range(0, c.num_ranks, c.sharers):
            group = slice(first, first + c.sharers)
            kept, hosted = self._shares(counts[group], self.placement.table[group], capacity_factor)
            for part, left in zip(parts[group], kept, strict=True):
                drop(part, list(left))
            processed += map(sum, hosted)
        load = np.array(processed)
        if experts.training and not in_backward():
            self._routed, self._processed = self._routed + counts, self._processed + load
        y_TD = experts(x_TD, idx, routing.topk_weights)
        return y_TD, torch.from_numpy(counts), torch.from_numpy(load)

    def _shares(self, counts: IntArray, table: IntArray, factor: float | None) -> tuple[Table, Table]:
        """What every rank of a group keeps and processes of every expert."""
        placement = Placement(table, self.c.num_experts)
        hosts = placement.multiplicity.tolist()

        def split(loads: list[int]) -> Table:
            if self.c.split == "exact":  # whose own tests hold it against a linear program
                hosted = exact_split(np.array(loads), placement)
                return with_copies(hosted, placement, self.c.transient_copies).hosted.tolist()
            return shared_out(loads, hosts)

        if factor is None or self.c.capacity_scope != "pooled":
            kept = room(counts.tolist(), hosts, factor, self.c.capacity_scope)
            return kept, split(_of_experts(kept))
        most = _whole(factor * int(counts.sum()) / table.size) * table.shape[1]
        hosted = [_shares(row, min(sum(row), most)) for row in split(_of_experts(counts.tolist()))]
        kept = [_shares(column, total) for column, total in zip(counts.T.tolist(), _of_experts(hosted), strict=True)]
        return [list(row) for row in zip(*kept, strict=True)], hosted

    def count(self, router: torch.nn.Module, args: Any, routing: Routing) -> None:
        """A hook for a router whose layer is left as it is: nothing is dropped there."""
        if router.training and not in_backward():
            counts = routing.counts.numpy()[None]
            self._routed, self._processed = self._routed + counts, self._processed + counts.sum(axis=1)

    def pop(self) -> tuple[IntArray, IntArray]:
        """Routed and processed since the last call."""
        found = self._routed, self._processed
        self._routed = self._processed = 0
        return found


def room(counts: Table, hosts: Table, factor: float | None, scope: str) -> Table:
    """What every rank of a group may keep of every expert, one number after the other.

    Args:
        counts: ``[n][E]`` assignments that the ranks route.
        hosts: ``[n][E]`` slots that the ranks give to experts.
        factor, scope: of the capacity.
    """
    ranks, experts = range(len(counts)), range(len(counts[0]))
    if factor is None:
        return counts
    if scope == "rank":
        limits = [_whole(factor * sum(counts[rank]) / len(experts)) for rank in ranks]
        return [[min(count, limits[rank]) for count in counts[rank]] for rank in ranks]
    of_slot = _whole(factor * sum(map(sum, counts)) / sum(map(sum, hosts)))
    kept = [[0 for _ in experts] for _ in ranks]
    for expert in experts:
        load = sum(counts[rank][expert] for rank in ranks)
        capacity = min(load, of_slot * sum(hosts[rank][expert] for rank in ranks))
        for rank, share in enumerate(_shares([counts[rank][expert] for rank in ranks], capacity)):
            kept[rank][expert] = share
    return kept


def shared_out(loads: list[int], hosts: Table) -> Table:
    """What every rank of a group processes of every expert, by its slots."""
    columns = [_shares([row[expert] for row in hosts], load) for expert, load in enumerate(loads)]
    return [list(row) for row in zip(*columns, strict=True)]


def _of_experts(table: Table) -> list[int]:
    return [sum(column) for column in zip(*table, strict=True)]


def _shares(weights: list[int], total: int) -> list[int]:
    """``total`` in proportion to ``weights``, the sums from the first on rounded down."""
    ends = [sum(weights[: i + 1]) * total // max(sum(weights), 1) for i in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _whole(number: float) -> int:
    """Rounded up, but for what is only a rounding error above."""
    return math.ceil(round(number, 6))


def drop(idx_TK: Tensor, room: list[int]) -> None:
    """Write ``-1``, in place, over every assignment for which its expert has no room left."""
    for token, experts in enumerate(idx_TK.tolist()):
        for k, expert in enumerate(experts):
            room[expert] -= 1
            if room[expert] < 0:
                idx_TK[token, k] = -1
