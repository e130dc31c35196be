"""``ExpertRebalancer``: the placement policy, its cadence, what is logged and the trace."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_swiftmoe._compat import Callback, will_log
from lightning_swiftmoe.arguments import check, check_count, knows_its_names
from lightning_swiftmoe.engine import EngineState, ExpertEngine, Rebalancing
from lightning_swiftmoe.kernels.dispatch import to_device
from lightning_swiftmoe.metrics import load_metrics
from lightning_swiftmoe.placement import PlacementPolicy, get_policy
from lightning_swiftmoe.placement.policies import name_of
from lightning_swiftmoe.step import Step
from lightning_swiftmoe.trace import TraceWriter

IN_PROGRESS_BAR = ("moe/token_survival", "moe/rank_imbalance", "moe/tokens_per_s")
LOGGED_PHASES = ("load", "dispatch", "combine", "gradient", "migration", "weight")


class ExpertRebalancer(Callback):
    """Says how experts are placed after every step; the strategy's engine decides and its weight update carries it out.

    ``SwiftMoEStrategy`` adds one with defaults when the Trainer has none.

    Args:
        policy: a name from ``policy_names()``, or a function ``(loads, cluster, previous) -> Placement``. ``"auto"``
            takes ``"proportional"`` for layers with a capacity, ``"balanced"`` for dropless ones. A copy of it is asked
            once before training, for loads that are made up.
        every_n_steps: decide on every n-th optimizer step, from the loads added up since the last decision.
        trace: file for the full counts of every step (``.npz``); None writes none.

    Raises:
        ValueError: unknown policy, or a cadence or file of another kind.
        TypeError: a policy that is neither a name nor a function of three arguments.
    """

    @knows_its_names
    def __init__(
        self,
        policy: str | PlacementPolicy = "auto",
        every_n_steps: int = 1,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        if trace is not None:
            check(isinstance(trace, (str, os.PathLike)), "trace", trace, "None or a file to write")
        self.rebalancing = Rebalancing(get_policy(policy), every_n_steps)
        self._trace = TraceWriter(trace) if trace is not None else None
        self._engine: ExpertEngine | None = None
        self._state = EngineState()
        self._finished: list[Step] = []
        self._last_time: float | None = None
        self._is_set_up = False

    # -- called by whoever makes the engine --------------------------------------------------------------------------

    @property
    def engine(self) -> ExpertEngine | None:
        """Whose steps are logged; it exists inside ``fit``."""
        return self._engine

    @property
    def state(self) -> EngineState:
        """Of the engine; before there is one, what a checkpoint said."""
        return self._state if self._engine is None else self._engine.state()

    def follow(self, engine: ExpertEngine) -> None:
        """Hear of every step of ``engine``, and keep its state in checkpoints."""
        self._engine = engine
        engine.observers.append(self._finished.append)

    def leave(self) -> None:
        """The engine ends; its last state stays."""
        if self._engine is not None:
            self._state = self._engine.state()
        self._engine = None

    # -- Lightning hooks ---------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        """The same for all, in checkpoints. A Trainer that is being made refuses a key that comes twice, and speaks of
        keys; ``only_rebalancer`` tells it better."""
        return super().state_key if self._is_set_up else f"{super().state_key}, number {id(self)}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_set_up = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._engine is None:
            rank_zero_warn(
                f"{type(self).__name__} does nothing in a Trainer with {type(trainer.strategy).__name__}: "
                'experts are placed by Trainer(strategy="swiftmoe")'
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The time between epochs (validation, checkpoints) is nobody's step.
        self._last_time = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._engine is not None:
            self._engine.end_step()
        finished, self._finished[:] = list(self._finished), []
        for step in finished:
            if not step.layers:
                continue
            if self._trace is not None and trainer.is_global_zero:
                self._trace.add(trainer.global_step, step)
            self._log(trainer, pl_module, step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_trace(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write_trace(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = EngineState(**state_dict)

    def _write_trace(self, trainer: Trainer) -> None:
        if self._trace is not None and trainer.is_global_zero:
            self._trace.write()

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        values = self._values(step)
        # Always to be read there; all else of Lightning's logging costs a copy to the device and kernels for a value.
        as_tensors = torch.tensor(list(values.values())).unbind()
        trainer.callback_metrics.update(zip(values, as_tensors, strict=True))
        if will_log(trainer):
            self._log_values(pl_module, values)
        elif trainer.progress_bar_callback is not None:
            self._log_values(pl_module, {name: values[name] for name in IN_PROGRESS_BAR if name in values})

    def _log_values(self, pl_module: LightningModule, values: dict[str, float]) -> None:
        """Through Lightning, as tensors on its device: from a number it would make one and wait for it."""
        on_device = to_device(torch.tensor(list(values.values())), pl_module.device)
        for name, value in zip(values, on_device.unbind(), strict=True):
            pl_module.log(name, value, prog_bar=name in IN_PROGRESS_BAR)

    def _values(self, step: Step) -> dict[str, float]:
        values = load_metrics(step.layers)
        values["moe/aux_loss"] = sum(layer.aux_loss for layer in step.layers) / len(step.layers)
        for phase in LOGGED_PHASES:
            traffic = step.traffic.get(phase)
            if traffic is None:
                continue
            values[f"moe/bytes_{phase}"] = float(traffic.sent_bytes)
            values[f"moe/ms_{phase}"] = traffic.seconds * 1e3
        now = time.perf_counter()
        if self._last_time is not None:
            values["moe/tokens_per_s"] = step.layers[0].num_tokens / (now - self._last_time)
        self._last_time = now
        return values


def only_rebalancer(callbacks: Iterable[Callback]) -> ExpertRebalancer | None:
    """The ``ExpertRebalancer`` among ``callbacks``; None where there is none.

    Raises:
        ValueError: there are several.
    """
    found = [callback for callback in callbacks if isinstance(callback, ExpertRebalancer)]
    if len(found) > 1:
        policies = ", ".join(f"{type(x).__name__}(policy={name_of(x.rebalancing.policy)!r})" for x in found)
        raise ValueError(f"experts are placed by one ExpertRebalancer, but the Trainer has {policies}: keep one")
    return found[0] if found else None
