"""``WeightEMA``: an exponential moving average of the weights, of which every rank averages its own part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_swiftmoe._compat import Callback, TrainerFn
from lightning_swiftmoe.arguments import check, check_count, check_flag, is_number, knows_its_names
from lightning_swiftmoe.parallel.expert_ops import local_part, part_of
from lightning_swiftmoe.strategy import SwiftMoEStrategy

_IN_PARTS = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class WeightEMA(Callback):
    """Averages of all trainable Parameters and of the buffers, and validation with them.

    After an optimizer step ``average = decay * average + (1 - decay) * weight``; the first one is the weight itself
    (``torch.optim.swa_utils.get_ema_multi_avg_fn``). Averages are fp32, or wider where the weight is. Floating
    persistent buffers are averaged too (``AveragedModel(use_buffers=True)``); where an average would not be finite, as
    of a mask of infinities, it is the buffer's value. Other buffers are left alone, and so is what is frozen: a
    Parameter that is frozen at an update has no average, and one that is unfrozen starts from its value then.

    Works under ``SwiftMoEStrategy``, ``VirtualCluster``, DDP and without a strategy. While training nothing is sent;
    when it ends every rank receives the whole averages. Checkpoints hold them whole in the callback's state, for any
    number of ranks. ``fit`` leaves the weights of training in the module. To test with averages::

        averaged = copy.deepcopy(module)
        ema.apply_to(averaged)
        trainer.test(averaged, batches)

    and with those of a checkpoint, also in a process whose ranks were spawned or forked, and so kept theirs::

        ema.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["WeightEMA"])

    Args:
        decay: share of the average that stays at an update.
        every_n_steps: update on every n-th optimizer step; micro-batches of an accumulation do not count.
        start_step: no update before this many optimizer steps.
        validate: validation inside ``fit`` sees the averages; the weights then come back, bit for bit, also where
            validation raises. What somebody writes into weights meanwhile is lost.

    Raises:
        ValueError: a bad argument; on ``fit``, a strategy that keeps other parts than ours, or moves them
            (``optimizer_state="bound"``), or averages of another module.
    """

    @knows_its_names
    def __init__(
        self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0, validate: bool = True
    ) -> None:
        check(is_number(decay) and 0 <= decay < 1, "decay", decay, "a number from 0 to below 1")
        check_count("every_n_steps", every_n_steps)
        check_count("start_step", start_step, "an integer from 0", least=0)
        check_flag("validate", validate)
        self.decay, self.every_n_steps, self.start_step, self.validate = decay, every_n_steps, start_step, validate
        self._averages: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}  # this rank's parts of the weights, while averages are in their places
        self._training: Trainer | None = None  # whose ranks hold parts of the averages; None: they are whole
        self._last_step = 0

    # -- for users ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_to(self, module: nn.Module) -> None:
        """Overwrite the weights of ``module`` with their averages, in its precision; what has none stays.

        Args:
            module: the one that was trained, a copy of it, or another one built alike.

        Raises:
            ValueError: there are no averages, or they are of another module.
        """
        if not self._averages:
            raise ValueError(
                "WeightEMA has no averages: they begin with an update in fit, or come by load_state_dict(...) from the "
                "'callbacks' of a checkpoint"
            )
        self._check(module)
        _write(module, self._averages)

    # -- training ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_strategy(trainer.strategy)

    @override
    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(pl_module)
        tensors = dict(_tensors(pl_module))
        averages = ((name, tensors[name], average) for name, average in self._averages.items())
        self._averages = {
            name: _part(tensor, average).to(local_part(tensor).device, copy=True) for name, tensor, average in averages
        }
        self._training = trainer
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._catch_up(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averages = _whole(trainer, self._averages, everywhere=True)
        self._training = None

    def _catch_up(self, trainer: Trainer) -> None:
        """Update if an optimizer stepped since last time, and it is time to."""
        before, self._last_step = self._last_step, trainer.global_step
        # Several optimizers may step in one batch, past a multiple.
        is_due = self._last_step // self.every_n_steps > before // self.every_n_steps
        if is_due and self._last_step >= self.start_step:
            self._update(trainer)

    @torch.no_grad()
    def _update(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, SwiftMoEStrategy) and strategy.engine is not None:
            # Biases of routers move when a step ends; whether ``ExpertRebalancer`` comes first should not matter.
            strategy.engine.end_step()
        values = {name: local_part(tensor).detach() for name, tensor in _averaged(trainer.lightning_module)}
        known = [name for name in values if name in self._averages]
        averages = [self._averages[name] for name in known]
        if known:
            wide = [values[name].to(self._averages[name].dtype) for name in known]
            torch._foreach_lerp_(averages, wide, 1 - self.decay)
        buffers = dict(_buffers(trainer.lightning_module))
        for name, average in zip(known, averages, strict=True):
            if name in buffers:
                average.copy_(torch.where(average.isfinite(), average, values[name]))
        # What was frozen since the last update falls out, what was unfrozen comes in.
        self._averages = {
            name: self._averages[name] if name in self._averages else _wide_copy(value)
            for name, value in values.items()
        }

    # -- validation --------------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validate and self._averages and trainer.state.fn == TrainerFn.FITTING:
            self._kept = {
                name: local_part(tensor).detach().clone()
                for name, tensor in _tensors(pl_module)
                if name in self._averages
            }
            self.apply_to(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back(pl_module)

    @torch.no_grad()
    def _put_back(self, module: nn.Module) -> None:
        kept, self._kept = self._kept, {}
        _write(module, kept)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Whole averages by name. While training under ``SwiftMoEStrategy`` collective, and complete on rank 0."""
        if self._training is None:
            return {"averages": self._averages}
        # A callback before this one may save after a step that is not averaged yet.
        self._catch_up(self._training)
        return {"averages": _whole(self._training, self._averages)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whole averages, of any number of ranks."""
        self._averages = dict(state_dict["averages"])
        self._training = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._kept:
            return
        # Somebody saves in the middle of validation: a run goes on from the weights, not from their averages.
        whole = _whole(trainer, self._kept)
        first_names = {tensor: name for name, tensor in _tensors(pl_module)}
        for name, tensor in _tensors(pl_module, every_name=True):
            if first_names[tensor] in whole and name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = whole[first_names[tensor]]

    def _check(self, module: nn.Module) -> None:
        """Raise a ValueError for averages of what ``module`` does not have."""
        tensors = dict(_tensors(module))
        for name, average in self._averages.items():
            check(name in tensors, "the module of WeightEMA", type(module).__name__, f"one that has {name!r}")
            shapes = [tuple(tensors[name].shape), tuple(local_part(tensors[name]).shape)]
            check(tuple(average.shape) in shapes, f"the average of {name!r}", average, f"of shape {shapes[0]}")


def _check_strategy(strategy: Any) -> None:
    """Raise a ValueError where a rank's parts are not known, or not the same on every step."""
    if isinstance(strategy, _IN_PARTS):
        raise ValueError(
            f"WeightEMA does not know the parts that {type(strategy).__name__} makes of Parameters: use "
            'strategy="swiftmoe", DDP or one process'
        )
    if isinstance(strategy, SwiftMoEStrategy) and strategy.state_place == "bound":
        raise ValueError(
            "WeightEMA averages parts that stay where they are, but optimizer_state='bound' moves them with the "
            "experts: use optimizer_state='decoupled'"
        )
    if isinstance(strategy, SwiftMoEStrategy) and strategy.redundancy > 1:
        raise ValueError("redundancy=2 has no second owner for WeightEMA's averages: leave one of the two out")


def _averaged(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What an update averages, by name."""
    yield from ((name, param) for name, param in module.named_parameters() if param.requires_grad)
    yield from _buffers(module)


def _tensors(module: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, Tensor]]:
    """What may have an average, by name; tied ones by the first name, or by every one."""
    yield from module.named_parameters(remove_duplicate=not every_name)
    yield from _buffers(module, every_name=every_name)


def _buffers(module: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, Tensor]]:
    for prefix, owner in module.named_modules(remove_duplicate=not every_name):
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _part(tensor: Tensor, value: Tensor) -> Tensor:
    """This rank's part of ``value``, which is whole, or the part already."""
    if isinstance(tensor, DTensor) and value.shape == tensor.shape:
        return part_of(tensor, value.to(local_part(tensor).device))
    return value


def _wide_copy(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Into this rank's parts, in place: whoever computes with them looks at their version counters."""
    for name, tensor in _tensors(module):
        if tensor.is_meta and name in values:  # in parts since fit, or not there yet: an average is whole
            owner, _, key = name.rpartition(".")
            whole = nn.Parameter(values[name].to("cpu", tensor.dtype, copy=True), tensor.requires_grad)
            module.get_submodule(owner).register_parameter(key, whole)
    tensors = [(tensor, values[name]) for name, tensor in _tensors(module) if name in values]
    if tensors:
        parts = [_part(tensor, value) for tensor, value in tensors]
        torch._foreach_copy_([local_part(tensor).detach() for tensor, _ in tensors], parts)


def _whole(trainer: Trainer, parts: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
    """On the host. Collective under our strategy; without ``everywhere`` experts reach rank 0 alone."""
    if isinstance(trainer.strategy, SwiftMoEStrategy):
        return trainer.strategy.full_values(parts, everywhere=everywhere)
    return {name: part.cpu() for name, part in parts.items()}
