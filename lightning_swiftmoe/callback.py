"""``ExpertRebalancer``: the placement policy, its cadence, the metrics and the trace."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_swiftmoe._compat import Callback
from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.layers.load import LayerLoad
from lightning_swiftmoe.layers.moe import MoE
from lightning_swiftmoe.metrics import load_metrics
from lightning_swiftmoe.placement import Placement, PlacementPolicy, get_policy, next_placement, uniform
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.step import LayerStep, Step
from lightning_swiftmoe.trace import TraceWriter

LOGGED_PHASES = ("load", "dispatch", "combine", "gradient", "migration", "weight")


class ExpertRebalancer(Callback):
    """Decides where experts go after every step; the strategy's weight update carries it out.

    ``SwiftMoEStrategy`` adds one with defaults when the Trainer has none.

    Args:
        policy: a name from ``policy_names()``, or a function ``(loads, cluster, previous) -> Placement``. ``"auto"``
            takes ``"proportional"`` for layers with a capacity, ``"balanced"`` for dropless ones.
        every_n_steps: decide on every n-th optimizer step, from the loads added up since the last decision.
        trace: file for the full counts of every step (``.npz``); None writes none.

    Raises:
        ValueError: unknown policy, or a cadence below one.
    """

    def __init__(
        self,
        policy: str | PlacementPolicy = "auto",
        every_n_steps: int = 1,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.policy, self.every_n_steps = get_policy(policy), every_n_steps
        self._trace = TraceWriter(trace) if trace is not None else None
        self._metrics = load_metrics()
        self._steps = 0
        self._loads: dict[str, IntArray] = {}
        self._placements: dict[str, Placement] = {}
        self._hint: dict[str, Any] = {}
        self._step: Step | None = None
        self._last_time: float | None = None

    # -- called by the strategy --------------------------------------------------------------------------------------

    def first_placement(self, layer: str, cluster: ClusterShape) -> Placement:
        """The placement to start with: the checkpoint's where it fits this cluster, else a uniform one."""
        table = self._hint.get("placements", {}).get(layer)
        placement = uniform(cluster)
        if table is not None and np.shape(table) == placement.table.shape:
            placement = Placement(np.array(table), cluster.num_experts)
        self._placements[layer] = placement
        return placement

    def decide(self, name: str, moe: MoE, load: LayerLoad, cluster: ClusterShape) -> LayerStep:
        """End the step of one layer: move its routing biases and choose its next placement.

        Args:
            name: the layer's name.
            moe: the layer.
            load: of the step that just ended, on the host.
            cluster: the shape it runs on.
        """
        moe.router.update_bias(load.counts.sum(dim=0))
        counts, before = load.counts.numpy(), self._placements[name]
        total = self._loads.pop(name, 0) + counts.sum(axis=0)
        if (self._steps + 1) % self.every_n_steps:
            self._loads[name] = total
        else:
            self._placements[name] = next_placement(self.policy, total, cluster, before)
        aux_loss = float(load.aux_loss) / load.num_forwards
        return LayerStep(name, counts, load.rank_load.numpy(), aux_loss, before, self._placements[name], moe.top_k)

    def end_step(self, step: Step) -> None:
        """Take note of a finished optimizer step."""
        self._steps += 1
        self._step = step

    # -- Lightning hooks ---------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The time between epochs (validation, checkpoints) is nobody's step.
        self._last_time = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, self._step = self._step, None
        if step is None or not step.layers:
            return
        if self._trace is not None and trainer.is_global_zero:
            self._trace.add(trainer.global_step, step)
        self._log(pl_module, step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_trace(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write_trace(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        tables = {layer: placement.table.tolist() for layer, placement in self._placements.items()}
        loads = {layer: counts.tolist() for layer, counts in self._loads.items()}
        return {"placements": tables, "loads": loads, "steps": self._steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._hint = state_dict
        self._steps = state_dict["steps"]
        self._loads = {layer: np.array(counts, dtype=np.int64) for layer, counts in state_dict["loads"].items()}

    def _write_trace(self, trainer: Trainer) -> None:
        if self._trace is not None and trainer.is_global_zero:
            self._trace.write()

    def _log(self, pl_module: LightningModule, step: Step) -> None:
        self._metrics.reset()
        for layer in step.layers:
            self._metrics.update(layer)
        values = {name: value.float() for name, value in self._metrics.compute().items()}
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=name in ("moe/token_survival", "moe/rank_imbalance"))
        mean_aux = sum(layer.aux_loss for layer in step.layers) / len(step.layers)
        pl_module.log("moe/aux_loss", torch.tensor(mean_aux, device=pl_module.device), sync_dist=True)
        for phase in LOGGED_PHASES:
            traffic = step.traffic[phase]
            pl_module.log(f"moe/bytes_{phase}", float(traffic.sent_bytes))
            pl_module.log(f"moe/ms_{phase}", traffic.seconds * 1e3)
        now = time.perf_counter()
        if self._last_time is not None:
            tokens = step.layers[0].num_tokens
            pl_module.log("moe/tokens_per_s", tokens / (now - self._last_time), prog_bar=True)
        self._last_time = now
