"""Every name we use from Lightning's inside, and the check that it is the Lightning we support."""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any, cast

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed as set_num_threads
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_callbacks_state_dict, _interrupt
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.amp import GradScaler
from torch.nn import Module
from torch.optim import Optimizer

from lightning_swiftmoe.checkpoint.random_numbers import GoingOn
from lightning_swiftmoe.parallel.uneven_validation import UnevenValidation

_OTHER_STRATEGIES = "pytorch_lightning.strategies"

__all__ = [
    "Callback",
    "EpochLoop",
    "LightningOptimizer",
    "MultiProcessingLauncher",
    "SIGTERMException",
    "SubprocessScriptLauncher",
    "TrainerFn",
    "TrainerStatus",
    "ValidationLoop",
    "WrappingCheckpointIO",
    "asked_to_end",
    "dump_checkpoint",
    "end_fit",
    "is_weight_averaging",
    "progress_of",
    "pruned_by",
    "refuse_other_namespace",
    "register_strategy",
    "requeue",
    "run_closure",
    "set_num_threads",
    "trainer_callbacks",
    "use_our_loop",
    "validate_without_inference_mode",
    "will_log",
]


def register_strategy(name: str, cls: type, description: str, **init: Any) -> None:
    """``StrategyRegistry.register``, which raises when a module is imported twice, made repeatable."""
    if name not in StrategyRegistry:
        StrategyRegistry.register(name, cls, description=description, **init)


class EpochLoop(_TrainingEpochLoop):
    """Lightning's, but ranks ask each other on their hosts whether one of them was told to end.

    Its own loop does so through the device at the head of every step and waits for the answer (2.6.6,
    ``_broadcast_sigterm_tensor``), so that no host can prepare a step while the device works on the one before.
    """

    def on_run_start(self, data_fetcher: Any) -> None:
        """An epoch begins, or goes on."""
        resumes = self.restarting or self.trainer.fit_loop.is_resuming
        if self._going_on is not None and self.trainer.current_epoch > 0 and not resumes:
            self._going_on.loaders_begin_again()
        super().on_run_start(data_fetcher)

    def advance(self, data_fetcher: Any) -> None:
        self.trainer.strategy.end_where_asked()  # type: ignore[attr-defined]
        self.trainer.strategy.before_batch()  # type: ignore[attr-defined]
        if self._going_on is not None and self.batch_progress.current.ready == 0:
            self._going_on.epoch_begins()
        super().advance(data_fetcher)

    @property
    def _going_on(self) -> GoingOn | None:
        return self.trainer.strategy.going_on  # type: ignore[attr-defined,no-any-return]

    def _broadcast_sigterm_tensor(self) -> None:
        """Asked already."""


class ValidationLoop(_EvaluationLoop):
    """Lightning's, but ranks tell each other on their hosts what they are about to do.

    A rank without a batch would leave the others waiting for the experts that it holds: it serves them instead.
    """

    def run(self) -> list[Any]:
        """Also where this rank has nothing to validate, which others must hear."""
        self.setup_data()
        if self.skip:
            self._end()
            return []
        return super().run()

    def _store_dataloader_outputs(self) -> None:
        """A loader is over: here metrics of all ranks come together."""
        if self._together is not None:
            self._together.loader_ends()
        super()._store_dataloader_outputs()

    def on_run_end(self) -> list[Any]:
        """And here once more."""
        self._end()
        return super().on_run_end()

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        # Loaders in other modes than one after another are one.
        batches = self._max_batches[dataloader_idx] if self._is_sequential else math.inf
        if self._together is not None:
            self._together.batch(dataloader_idx, batch_idx, batches)
        super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)

    def _end(self) -> None:
        if self._together is not None:
            self._together.validation_ends()

    @property
    def _together(self) -> UnevenValidation | None:
        return self.trainer.strategy.validation  # type: ignore[attr-defined,no-any-return]


class SignalConnector(_SignalConnector):
    """Lightning's, but its handlers only note what arrived; whoever reads it may talk to other ranks.

    Its own handlers do so themselves (2.6.6: they broadcast on SIGTERM, save a checkpoint on SLURM's requeue signal),
    and ranks that no signal reached do not answer. Nor does one rank end where the others go on: ``received_sigterm``
    stays false. Outside ``fit`` no rank needs another, and each ends by itself.
    """

    asked: signal.Signals | None = None

    def register_signal_handlers(self) -> None:
        self.asked = None
        super().register_signal_handlers()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._register_signal(signal.SIGINT, self._note_interrupt)

    def requeue(self) -> None:
        """What Lightning does on SLURM's signal: save a checkpoint and ask for the job to be run again. Collective."""
        super()._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # type: ignore[arg-type]

    def _note_interrupt(self, signum: int, frame: Any) -> None:
        """Ctrl+C: at the end of the step; at once when it comes again."""
        if self.asked == signal.SIGINT or not self._is_fitting():
            signal.default_int_handler(signum, frame)
        self.asked = self.asked or signal.SIGINT

    def _sigterm_notifier_fn(self, signum: Any, frame: Any) -> None:
        launcher = self.trainer.strategy.launcher
        if self.trainer.strategy.job_failed():  # type: ignore[attr-defined]
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if self.asked != signal.SIGTERM and launcher is not None:
            launcher.kill(signum)
        self.received_sigterm = not self._is_fitting()
        if self.asked != signal.SIGUSR1:
            self.asked = signal.SIGTERM

    def _is_fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def _slurm_sigusr_handler_fn(self, signum: Any, frame: Any) -> None:
        self.asked = signal.SIGUSR1  # whichever signal SLURM sends for it


def asked_to_end(trainer: Trainer) -> signal.Signals | None:
    """The signal that reached this rank: SIGINT, SIGTERM, or SIGUSR1 for SLURM's wish to run the job again later."""
    return cast(SignalConnector, trainer._signal_connector).asked


def requeue(trainer: Trainer) -> None:
    """See ``SignalConnector.requeue``."""
    cast(SignalConnector, trainer._signal_connector).requeue()


def end_fit(trainer: Trainer, error: BaseException) -> None:
    """What Lightning does in a process whose fit was interrupted. It forgets that in ranks which it forks (2.6.6)."""
    _interrupt(trainer, error)
    trainer._teardown()


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Everything that ``save_checkpoint`` would save."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def progress_of(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint has of where training is, a copy: all but weights, optimizers and what users add."""
    return copy.deepcopy(
        {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "loops": trainer._checkpoint_connector._get_loops_state_dict(),
            "callbacks": _call_callbacks_state_dict(trainer),
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }
    )


def use_our_loop(trainer: Trainer) -> None:
    """Let ``trainer`` train by an ``EpochLoop`` and validate by a ``ValidationLoop``, with all that its own loops know
    already, and note signals."""
    theirs = trainer.fit_loop.epoch_loop
    if not isinstance(theirs, EpochLoop):
        ours = EpochLoop(trainer, theirs.min_steps, theirs.max_steps)
        vars(ours).update(vars(theirs))
        ours.val_loop = _our_validation(trainer, theirs.val_loop)
        trainer.fit_loop.epoch_loop = ours
    if not isinstance(trainer._signal_connector, SignalConnector):
        trainer._signal_connector = SignalConnector(trainer)


def _our_validation(trainer: Trainer, theirs: _EvaluationLoop) -> ValidationLoop:
    ours = ValidationLoop(trainer, theirs._trainer_fn, theirs._stage)
    vars(ours).update(vars(theirs))
    return ours


def validate_without_inference_mode(trainer: Trainer) -> None:
    """In ``fit`` validation only goes without gradients: tensors that FSDP2 makes in inference mode cannot be trained.

    Lightning itself knows so of its ``FSDPStrategy`` (2.6.6, ``_no_grad_context``).
    """
    trainer.fit_loop.epoch_loop.val_loop.inference_mode = False


def trainer_callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, as the list that may be added to."""
    return trainer.callbacks  # type: ignore[attr-defined]


def run_closure(precision: Precision, module: Any, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    """Forward, backward and clipping of a step, with all hooks up to the optimizer's own step."""
    return precision._wrap_closure(module, optimizer, closure)


def loss_scaler(precision: Precision) -> GradScaler | None:
    """fp16's loss scale; None where there is none, or it is switched off."""
    scaler = getattr(precision, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def set_loss_scaler(precision: Precision, scaler: GradScaler) -> None:
    """Let another one take its place: ``precision`` has one."""
    precision.scaler = scaler  # type: ignore[attr-defined]


def will_log(trainer: Trainer) -> bool:
    """Whether Lightning hands the values of this step to the loggers."""
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def is_weight_averaging(callback: Callback) -> bool:
    """Stock callbacks that average parameters by position."""
    return isinstance(callback, (WeightAveraging, StochasticWeightAveraging))


def pruned_by(callback: Callback) -> list[tuple[Module, str]]:
    """Modules and names of the Parameters that the stock callback prunes; it knows them from its ``setup`` on."""
    return list(callback._parameters_to_prune or ()) if isinstance(callback, ModelPruning) else []


def refuse_other_namespace(names: list[str]) -> None:
    """``pytorch_lightning`` is another class tree: there our names answer with what to import instead.

    Where nobody has imported it yet, they will from the moment somebody does.
    """
    other = sys.modules.get(_OTHER_STRATEGIES)
    if other is None:
        _WaitsForOther(names).install()
        return

    class _WrongNamespace(other.DDPStrategy):  # type: ignore[name-defined, misc]
        def __init__(self, **_: Any) -> None:
            raise ImportError(
                "lightning_swiftmoe supports lightning.pytorch only, and this Trainer comes from pytorch_lightning: "
                "import lightning.pytorch as pl, for the Trainer, the LightningModule and every callback"
            )

    for name in names:
        if name not in other.StrategyRegistry:
            other.StrategyRegistry.register(name, _WrongNamespace, description="see lightning.pytorch")


class _WaitsForOther(MetaPathFinder):
    """Finds nothing by itself: it notices that the other package is imported, once, and acts behind that."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def install(self) -> None:
        """Be asked first."""
        if not any(isinstance(finder, _WaitsForOther) for finder in sys.meta_path):
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec that the usual finders have, with an afterthought."""
        if fullname != _OTHER_STRATEGIES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_refuse(module: Any) -> None:
                execute(module)
                refuse_other_namespace(self.names)

            spec.loader.exec_module = execute_and_refuse  # type: ignore[method-assign]
        return spec
