"""Every name we use from Lightning's inside, and the check that it is the Lightning we support."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed as set_num_threads
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.optim import Optimizer

__all__ = [
    "Callback",
    "LightningOptimizer",
    "MultiProcessingLauncher",
    "SubprocessScriptLauncher",
    "TrainerFn",
    "TrainerStatus",
    "is_weight_averaging",
    "refuse_other_namespace",
    "register_strategy",
    "run_closure",
    "set_num_threads",
    "trainer_callbacks",
    "will_log",
]


def register_strategy(name: str, cls: type, description: str, **init: Any) -> None:
    """``StrategyRegistry.register``, which raises when a module is imported twice, made repeatable."""
    if name not in StrategyRegistry:
        StrategyRegistry.register(name, cls, description=description, **init)


def trainer_callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, as the list that may be added to."""
    return trainer.callbacks  # type: ignore[attr-defined]


def run_closure(precision: Precision, module: Any, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    """Forward, backward and clipping of a step, with all hooks up to the optimizer's own step."""
    return precision._wrap_closure(module, optimizer, closure)


def will_log(trainer: Trainer) -> bool:
    """Whether Lightning hands the values of this step to the loggers."""
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def is_weight_averaging(callback: Callback) -> bool:
    """Stock callbacks that average parameters by position."""
    return isinstance(callback, (WeightAveraging, StochasticWeightAveraging))


def refuse_other_namespace(names: list[str]) -> None:
    """``pytorch_lightning`` is another class tree: there our names answer with what to import instead."""
    other = sys.modules.get("pytorch_lightning.strategies")
    if other is None:
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
