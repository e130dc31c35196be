"""What a strategy with sharded experts saves and loads: canonical weights and optimizer state, in files or folders."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_swiftmoe._compat import (
    LightningOptimizer,
    TrainerFn,
    TrainerStatus,
    WrappingCheckpointIO,
    trainer_callbacks,
)
from lightning_swiftmoe.arguments import check_choice, check_flag
from lightning_swiftmoe.checkpoint.background import Background
from lightning_swiftmoe.checkpoint.checks import check_keys, check_optimizer_states, check_weights, on_all_ranks
from lightning_swiftmoe.checkpoint.folder import Place, check_folder
from lightning_swiftmoe.checkpoint.full import (
    assembled_optimizer_state,
    assembled_weights,
    full_optimizer_state,
    full_parts,
    full_weights,
    load_full_optimizer_state,
    load_full_weights,
    owners,
)
from lightning_swiftmoe.checkpoint.io import WholeCheckpointIO, local_path
from lightning_swiftmoe.checkpoint.random_numbers import GoingOn, current_state
from lightning_swiftmoe.checkpoint.reading import listed
from lightning_swiftmoe.checkpoint.sharded import sharded_optimizer_state, sharded_weights, share_of, write_folder
from lightning_swiftmoe.checkpoint.sharded_reading import SavedOptimizer, SavedWeight, read_folder, saved_weights
from lightning_swiftmoe.checkpoint.snapshot import Snapshot
from lightning_swiftmoe.checkpoint.sums import fingerprint, not_finite
from lightning_swiftmoe.engine import ExpertEngine
from lightning_swiftmoe.layers.layer import experts_name
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.find_layers import find_layers
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts
from lightning_swiftmoe.parallel.meta_start import (
    all_trained,
    experts_without_memory,
    forget_trained,
    has_meta,
    is_trained,
    knowing_of_parts,
    materialize_dense,
    materialize_experts,
    trained_by,
)
from lightning_swiftmoe.parallel.setup import Parallelism
from lightning_swiftmoe.parallel.sharded import ShardHolder
from lightning_swiftmoe.parallel.sharded_dense import ShardedDense
from lightning_swiftmoe.redundancy import STEPS_TAKEN, Assembled

_FORMATS = ("full", "sharded")
_RANDOM_NUMBERS = "swiftmoe_random_numbers"  # in a checkpoint: where those of every rank stand, by rank


def check_format(checkpoint: str, async_save: bool, optimizer_state: str) -> None:
    """Raise a ValueError where checkpoints cannot be saved this way."""
    check_choice("checkpoint", checkpoint, _FORMATS)
    check_flag("async_save", async_save)
    if async_save and checkpoint != "sharded":
        raise ValueError(f"async_save=True needs checkpoint='sharded', got checkpoint={checkpoint!r}")
    if checkpoint == "sharded" and optimizer_state == "bound":
        raise ValueError(
            "checkpoint='sharded' needs optimizer_state='decoupled': state bound to hosts has no place of its own; use "
            "checkpoint='full'"
        )


class CheckpointingStrategy(DDPStrategy):
    """The part of ``SwiftMoEStrategy`` that saves and loads; experts are there in ``fit`` only.

    Args:
        sharded: save folders to which every rank adds what it holds; else files, written by rank 0.
        async_save: of folders, while training goes on.
        **kwargs: as for ``DDPStrategy``.
    """

    expert_parallel_size: int | None
    state_place: str

    def __init__(self, *, sharded: bool, async_save: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sharded = sharded
        self.async_save = async_save
        self.engine: ExpertEngine | None = None
        self.parallelism: Parallelism | None = None
        self._experts: dict[str, HostedExperts] = {}
        self._dense: ShardedDense | None = None
        self._masters: dict[str, Tensor | SavedWeight] = {}
        self._left: dict[str, SavedWeight] = {}  # weights in a folder that nobody has read yet
        self._before_loading: Snapshot | None = None
        self.going_on: GoingOn | None = None
        self._steps_taken = 0  # by the weights of a checkpoint, behind all else in it
        self._assembled: Assembled | None = None  # experts for a checkpoint, while ranks that are left make one
        self._ends_together = False
        self._saving = Background()
        self._saving_group: dist.ProcessGroup | None = None
        self._host_memory: dict[Place, Tensor] = {}

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> Trainer:
        return self._module.trainer

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self.going_on = None
        self._steps_taken = 0
        for callback in trainer_callbacks(model.trainer):
            if self.async_save and isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
                raise ValueError(
                    "ModelCheckpoint(save_last='link') would name a checkpoint that async_save=True is still "
                    "writing: use save_last=True, which saves another"
                )

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """Ours, where the user gave none; also inside a wrapper that has nothing inside."""
        if self._checkpoint_io is None:
            self._checkpoint_io = WholeCheckpointIO()
        elif isinstance(self._checkpoint_io, WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = WholeCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a checkpoint, the same on all ranks; or every rank raises. Collective."""

        path = local_path(checkpoint_path)
        folder = path if path is not None and path.is_dir() else None
        fits = self.engine is None and self._trainer.state.fn == TrainerFn.FITTING
        unread = experts_without_memory(self._module) if fits else set()
        self._left = {}

        def load() -> dict[str, Any]:
            if folder is not None:
                checkpoint = read_folder(folder, unread)
                self._left = saved_weights(folder, unread)
                if broken := not_finite(checkpoint):
                    rank_zero_warn(f"in {folder} {listed(broken)} not finite: training goes on from NaN or Inf")
            else:
                checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
            check_keys(checkpoint, ["state_dict", "pytorch-lightning_version"])
            return checkpoint

        torch.cuda.empty_cache()
        # A rank without the folder takes part in the first agreement too, and says that it has no such file.
        on_all_ranks(lambda: None if folder is None else check_folder(folder, self.global_rank, self.world_size))
        checkpoint = on_all_ranks(load, mark=fingerprint)
        by_rank = checkpoint.get(_RANDOM_NUMBERS, ())
        # It is not the same run with more ranks or fewer, and two ranks must not draw the same.
        if len(by_rank) == self.world_size:
            self.going_on = GoingOn(by_rank[self.global_rank], self.root_device)
        self._steps_taken = checkpoint.get(STEPS_TAKEN, 0)
        return checkpoint

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """As of Lightning's; collective where checkpoints are sharded.

        Raises:
            OSError: a disk is full, or refuses: this time, or the last where that was in the background.
        """
        checkpoint[_RANDOM_NUMBERS] = self._random_numbers()
        if not self.sharded:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = local_path(self.broadcast(filepath))
        if path is None or storage_options is not None:
            raise ValueError(
                f"sharded checkpoints are folders on a file system of this machine, got {filepath!r} with "
                f"storage_options={storage_options!r}: use checkpoint='full'"
            )
        self._saving.finish()
        with self._host_group() as group:
            content = share_of(checkpoint, group)
            if self.async_save and self.engine is not None:
                content = content.on_host(self._host_memory)
                own_group = self._group_for_saving(group)
                self._saving.start(lambda: write_folder(content, path, own_group))
            else:
                write_folder(content, path, group)

    def _random_numbers(self) -> list[dict[str, Any]]:
        mine = current_state(self.root_device)
        with self._host_group() as group:
            if group is None:
                return [mine]
            everybody: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(everybody, mine, group)
            return everybody

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Not before the checkpoint that takes its place is whole."""
        self._saving.afterwards(lambda: super(CheckpointingStrategy, self).remove_checkpoint(filepath))

    @override
    def on_train_end(self) -> None:
        self._saving.finish()

    def finish_saving(self) -> None:
        """Wait for what is written in the background, and leave its group. Collective.

        Raises:
            OSError: it was not written.
        """
        try:
            self._saving.finish()
        finally:
            self._host_memory = {}
            if self._saving_group is not None:
                dist.destroy_process_group(self._saving_group)
                self._saving_group = None

    @contextmanager
    def _host_group(self) -> Iterator[dist.ProcessGroup | None]:
        """All ranks, on the host; None with one."""
        if self.parallelism is not None:
            control = self.parallelism.control
            yield None if control is None else control.group
        elif dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=self._timeout)
            yield group
            dist.destroy_process_group(group)
        else:
            yield None

    def _group_for_saving(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """The same ranks, for the thread alone: two threads in one group would meet in each other's collectives."""
        if group is not None and self._saving_group is None:
            self._saving_group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._saving_group

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Canonical weights. While fitting this is collective, and rank 0 alone receives the experts; where checkpoints
        are sharded each rank has its parts.
        """
        return self._state_dict(self.sharded)

    def full_state_dict(self) -> dict[str, Any]:
        """Canonical weights, complete on rank 0, however checkpoints are saved. Collective."""
        return self._state_dict(False)

    def _state_dict(self, sharded: bool) -> dict[str, Any]:
        with knowing_of_parts():
            state = super().lightning_module_state_dict()
        if self._assembled is not None:
            return assembled_weights(state, self._module, self._experts, self._assembled.weights)
        self._refuse_after_failure()
        if self.engine is None and is_trained(self._module):
            return self._with_trained_weights(state)
        if sharded:
            return sharded_weights(state)
        return state if self.engine is None else full_weights(state, self._module, self._holders)

    @property
    def _holders(self) -> dict[str, ShardHolder]:
        """Whoever has parts of Parameters, by name in the user's module."""
        dense = {} if self._dense is None else {"": self._dense}
        return {**self._experts, **dense}

    def _with_trained_weights(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` with experts that are in parts since ``fit`` ended, complete on rank 0. Collective."""
        gathered: dict[nn.Parameter, Tensor | None] = {}  # tied ones once
        with self._ranks_for(all_trained(self._module)):
            for name, param in self._module.named_parameters(remove_duplicate=False):
                hosted = trained_by(param)
                if hosted is None:
                    continue
                if param not in gathered:
                    key = name.rpartition(".")[2]
                    part = hosted.local(key)
                    if self.sharded:
                        gathered[param] = hosted.gather(key, part, "checkpoint")
                    else:
                        gathered[param] = hosted.gather_for_checkpoint(key, part)
                whole = gathered[param]
                if whole is None:
                    del state[name]
                else:
                    state[name] = whole.cpu()
        return state

    @contextmanager
    def _ranks_for(self, experts: Collection[HostedExperts]) -> Iterator[Parallelism]:
        """Process groups for the moment, of experts that are in parts since ``fit``: those of then are gone."""
        size = next(iter(experts)).group_size
        parallelism = Parallelism.on(self.root_device, self._timeout, expert_parallel_size=size)
        for hosted in experts:
            hosted.communicator, hosted.replicas = parallelism.state, parallelism.state_replicas
        yield parallelism
        parallelism.close()

    def fill_in(self, *, experts: bool) -> int:
        """Weights for what the user's module has on the meta device. Collective where it has something there.

        Args:
            experts: every rank gets all of them, too; in ``fit`` each has a part of its own.

        Returns:
            The seed they are drawn with, the module's ``meta_seed`` or torch's of rank 0.
        """
        if not has_meta(self._module):
            return 0
        seed: int = self.broadcast(getattr(self._module, "meta_seed", torch.initial_seed()))
        materialize_dense(self._module, seed)
        if experts and is_trained(self._module):
            with self._ranks_for(all_trained(self._module)) as parallelism:
                materialize_experts(self._module, seed, parallelism.state)
        elif experts:
            materialize_experts(self._module, seed, Communicator(None, self.root_device))
        return seed

    def gather_experts(self) -> None:
        """Whole experts on every rank, in the user's module, after the ``fit`` of one built on the meta device.

        Collective: for what Lightning knows nothing of, such as ``save_pretrained``. Validation, tests, predictions and
        checkpoints of the Trainer do so by themselves.
        """
        self.fill_in(experts=True)

    @override
    @knowing_of_parts()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        on_all_ranks(lambda: self._check_checkpoint(checkpoint, strict))
        if self.engine is not None:
            load_full_weights(self._module, checkpoint["state_dict"], self._holders, strict)
            self.engine.weights_changed()
            return
        self.fill_in(experts=self._trainer.state.fn != TrainerFn.FITTING)
        if self._trainer.state.fn == TrainerFn.FITTING:
            # There are no optimizers yet to compare their states with.
            self._before_loading = Snapshot(self._module)
        # Lightning converts the module later: loading 64-true weights before that would round them to fp32.
        self.precision_plugin.convert_module(self._module)
        # Masters may be more precise than the module's own weights (bf16-true); keep them until sharding.
        state = checkpoint["state_dict"]
        self._masters = {
            k: self._left[k] if k in self._left else state[k]
            for name, moe in find_layers(self._module).items()
            for key in moe.experts.parameter_names
            if (k := f"{experts_name(name, moe)}.{key}") in state
        }
        without_memory = experts_without_memory(self._module)
        if without_memory:
            rest = {name: value for name, value in state.items() if name not in without_memory}
            checkpoint, strict = {**checkpoint, "state_dict": rest}, False  # checked already
        super().load_model_state_dict(checkpoint, strict)

    def _check_checkpoint(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        if self._trainer.state.fn == TrainerFn.FITTING and self.engine is None:
            check_keys(checkpoint, ["optimizer_states", "lr_schedulers", "loops"])
        check_weights(self._module, checkpoint["state_dict"], strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Canonical state: what one process without a strategy would have saved. Collective; complete on rank 0."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if self._assembled is not None:
            states = self._assembled.states[self.optimizers.index(optimizer)]
            return assembled_optimizer_state(optimizer, owners(self._experts), states)
        self._refuse_after_failure()
        if self.sharded:
            return sharded_optimizer_state(optimizer, {param: name for name, param in self._module.named_parameters()})
        with self._ranks_after_fit():
            return full_optimizer_state(optimizer, owners(self._holders))

    def full_values(self, parts: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
        """What a callback keeps of every Parameter, canonical; see ``full_parts``. Collective; complete on rank 0."""
        self._refuse_after_failure()
        with self._ranks_after_fit():
            return full_parts(parts, self._holders, everywhere=everywhere)

    @contextmanager
    def _ranks_after_fit(self) -> Iterator[None]:
        """Optimizer state is still sharded after ``fit``."""
        if self.engine is not None or not self._experts:
            yield
            return
        with self._ranks_for(self._experts.values()):
            yield

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        names = {param: name for name, param in self._module.named_parameters()}
        described = [state.described() if isinstance(state, SavedOptimizer) else state for state in states]
        on_all_ranks(lambda: check_optimizer_states(self.optimizers, described, names))
        of = owners(self._holders)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            if not isinstance(state, SavedOptimizer):
                load_full_optimizer_state(optimizer, of, state)
            elif self.state_place == "bound":
                load_full_optimizer_state(optimizer, of, on_all_ranks(state.read))
            else:
                params = [param for group in optimizer.param_groups for param in group["params"]]
                kept = [of.get(param) for param in params]
                optimizer.load_state_dict(on_all_ranks(partial(state.read, kept)))
        if self.going_on is not None:  # nothing else is restored behind this
            self.going_on.before_loaders()

    @override
    def on_train_start(self) -> None:
        self._before_loading = None
        for hosted in self._experts.values():
            forget_trained(hosted.originals.values())
        if self.going_on is not None:
            self.going_on.behind_loaders()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.going_on = None

    def _refuse_after_failure(self) -> None:
        if not self._holders or self._ends_together:
            return
        if self._trainer.state.status == TrainerStatus.INTERRUPTED:
            raise RuntimeError(
                "experts are spread over all ranks and cannot be gathered after an exception on one of them; resume "
                "from the last checkpoint"
            )
