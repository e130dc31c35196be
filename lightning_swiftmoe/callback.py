"""``ExpertRebalancer``: the placement policy, its cadence, what is logged and the trace."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
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
LOGGED_PHASES = ("load", "transient_copies", "dispatch", "combine", "gradient", "migration", "weight")


class ExpertRebalancer(Callback):
    """Says how experts are placed after every step; the strategy's engine decides and its weight update carries it out.

    ``SwiftMoEStrategy`` adds one with defaults when the Trainer has none.

    Args:
        policy: a name from ``policy_names()``, or a function ``(loads, cluster, previous) -> Placement``. ``"auto"``
            takes ``"proportional"`` for layers with a capacity, ``"balanced"`` for dropless ones. A copy of it is asked
            once before training, for loads that are made up.
        every_n_steps: decide on every n-th optimizer step, from the loads added up since the last decision.
        trace: file ``*.npy.gz`` for the full counts of every step, as ``TraceWriter`` says; None writes none.

    Raises:
        ValueError: unknown policy, a cadence below one or of another kind, or a trace of another name; on ``fit``, a
            trace that cannot be written, or layers with different numbers of experts in one.
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
        self._untraced: list[Step] = []
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
        engine.observers += [self._finished.append, self._untraced.append]

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
        if stage == "fit":
            self._on_trace(trainer, TraceWriter.check)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._engine is None:
            rank_zero_warn(
                f"{type(self).__name__} does nothing in a Trainer with {type(trainer.strategy).__name__}: "
                'experts are placed by Trainer(strategy="swiftmoe")'
            )
        elif self._trace is not None:
            _check_traceable(self._engine)
        self._on_trace(trainer, lambda trace: trace.begin(trainer.global_step))

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
        self._trace_steps(trainer)
        finished, self._finished[:] = list(self._finished), []
        for step in finished:
            if step.layers:
                self._log(trainer, pl_module, step)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Who resumes from it writes the steps behind it only, and it may be saved before this batch ends for us.
        self._trace_steps(trainer)
        self._flush_trace(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush_trace(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._flush_trace(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = EngineState(**state_dict)

    # -- the trace, which rank 0 writes ------------------------------------------------------------------------------

    def check_trace(self) -> None:
        """For whoever can say so before ranks start; ``fit`` makes sure by itself.

        Raises:
            ValueError: the trace cannot be written.
        """
        problem = self._problem(TraceWriter.check)
        if problem is not None:
            raise ValueError(problem)

    def _on_trace(self, trainer: Trainer, do: Callable[[TraceWriter], None]) -> None:
        """Rank 0 does it, and where it cannot all ranks raise.

        Raises:
            ValueError: it cannot.
        """
        problem = self._problem(do) if trainer.is_global_zero else None
        # Without a trace too: whoever gives one to a single rank must not leave the others behind.
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)

    def _problem(self, do: Callable[[TraceWriter], None]) -> str | None:
        if self._trace is None:
            return None
        try:
            do(self._trace)
        except (OSError, ValueError) as error:
            return f"trace={self._trace.path} cannot be written ({error}); name a file that you may write"
        return None

    def _trace_steps(self, trainer: Trainer) -> None:
        steps, self._untraced[:] = list(self._untraced), []
        if self._trace is None or not trainer.is_global_zero:
            return
        for step in steps:
            if step.layers:
                self._trace.add(trainer.global_step, step)

    def _flush_trace(self, trainer: Trainer) -> None:
        if self._trace is not None and trainer.is_global_zero:
            self._trace.flush()

    # -- metrics -----------------------------------------------------------------------------------------------------

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
        losses = [layer.aux_loss for layer in step.layers if layer.aux_loss is not None]
        if losses:
            values["moe/aux_loss"] = sum(losses) / len(losses)
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


def _check_traceable(engine: ExpertEngine) -> None:
    """On every rank alike.

    Raises:
        ValueError: layers of different shapes.
    """
    experts = {layer.name: layer.cluster.num_experts for layer in engine.layers}
    if len(set(experts.values())) > 1:
        raise ValueError(f"a trace needs layers with the same number of experts, got {experts}; train without trace=")


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
