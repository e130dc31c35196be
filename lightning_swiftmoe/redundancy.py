"""``SwiftMoEStrategy(redundancy=2)``: a fit that loses a rank is saved from the memory of the others.

Every shard is stepped by two ranks (``ShardCopies``). What is no shard all ranks have anyhow. Where a rank dies the
others agree on a step (``Rescue``), and the first of them makes an ordinary checkpoint of what they hold.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_swiftmoe._compat import progress_of
from lightning_swiftmoe.checkpoint.checks import on_all_ranks
from lightning_swiftmoe.checkpoint.full import Owner
from lightning_swiftmoe.checkpoint.io import local_path
from lightning_swiftmoe.checkpoint.periodic import checkpoints_in
from lightning_swiftmoe.parallel.copies_aside import CopiesAside
from lightning_swiftmoe.parallel.expert_tensor import local_part
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts
from lightning_swiftmoe.parallel.setup import Parallelism
from lightning_swiftmoe.parallel.shard_copies import ShardCopies, sharded
from lightning_swiftmoe.rescue import Rescue, Survivors

T = TypeVar("T")
Values = dict[str, Any]  # of one Parameter: "weight", and what the optimizer keeps of it

FOLDER = "rescue"
STEPS_TAKEN = "swiftmoe_steps_taken"  # in a checkpoint: by its weights and optimizer state, behind all else in it
_WEIGHT = "weight"
_PERIOD_S = 0.01
_PATIENCE_S = 2.0  # with the device, for what was asked of it at the head of a step


@dataclass(frozen=True)
class Assembled:
    """Whole tensors of experts, put together from what ranks hold.

    Args:
        weights: by canonical Parameter.
        states: of each optimizer, by canonical Parameter.
    """

    weights: dict[Owner, Tensor]
    states: list[dict[Owner, Values]]


class Redundancy:
    """Of one rank, in one fit.

    Args:
        trainer: of the fit.
        parallelism: its ranks, at least two.
        optimizers: all of them.
        of: whose a sharded Parameter is.
        dump: makes a checkpoint with these experts; only Lightning knows what else is in one.

    Raises:
        ValueError: the Trainer's ``default_root_dir`` is on no file system of this machine.
    """

    def __init__(
        self,
        trainer: Trainer,
        parallelism: Parallelism,
        optimizers: Sequence[Optimizer],
        of: Mapping[nn.Parameter, tuple[HostedExperts, str]],
        dump: Callable[[Assembled], dict[str, Any]],
    ) -> None:
        assert parallelism.control is not None
        self._trainer = trainer
        self._parallelism, self._control = parallelism, parallelism.control
        self._optimizers, self._of, self._dump = list(optimizers), of, dump
        self._boundary: tuple[int, dict[str, Any]] | None = None
        rank, num_ranks = parallelism.control.rank, parallelism.num_ranks
        root = local_path(trainer.default_root_dir)
        if root is None:
            raise ValueError(
                f"redundancy=2 keeps files under default_root_dir, got {trainer.default_root_dir!r}: give the Trainer "
                "a folder on a file system that all ranks see"
            )
        self._folder = root / FOLDER
        self._marks: list[torch.cuda.Event] = []  # newest first: what is held is complete when one has passed
        self._copies_aside: CopiesAside | None = None
        self._rescue = Rescue(self._folder, rank, num_ranks, self._held, self._save, _tell, self._aside, self._stuck)
        if parallelism.device.type == "cuda":
            self._copies_aside = CopiesAside(parallelism.device)
        self._copies: dict[Optimizer, ShardCopies] = {}
        if parallelism.state_replicas is None:  # other expert groups have them
            per_node = trainer.strategy.num_processes  # type: ignore[attr-defined]
            offset = per_node if num_ranks > per_node else 1
            self._copies = {
                optimizer: ShardCopies(optimizer, of, parallelism.state, parallelism.control, offset)
                for optimizer in optimizers
            }

    def begin(self) -> None:
        """Training starts: every shard gets its second owner. Collective.

        Raises:
            OSError: the folder cannot be written to.
        """
        on_all_ranks(lambda: Rescue.prepare(self._folder) if self._control.rank == 0 else None)
        self._rescue.hold()
        for copies in self._copies.values():
            copies.receive_all()
            copies.install()
        self._marks = self._mark()
        self._meet()
        self._rescue.watch()

    def before_batch(self) -> None:
        """Note where Lightning is, unless gradients of earlier batches wait for the step."""
        if self._boundary is None or self._boundary[0] != self._rescue.steps:
            self._boundary = self._rescue.steps, progress_of(self._trainer)
            self._marks = [*self._mark(), *self._marks[:1]]
        self._rescue.begin_step()

    def step(self, optimizer: Optimizer, on_copies: Callable[[], Any], on_shards: Callable[[], T]) -> T:
        """Both steps, on all ranks or on none. Collective.

        Args:
            optimizer: whose.
            on_copies: takes the step on the Parameters that it then has.
            on_shards: takes it on this rank's own.
        """
        copies = self._copies.get(optimizer)
        if copies is not None:
            copies.receive_gradients()

        def vote() -> None:
            # Who says how its copies are has the gradients too.
            if copies is not None and copies.are_as_owners():
                return
            if copies is not None:
                copies.receive_all()
            self._meet()

        def both() -> T:
            with self._calls():
                if copies is not None:
                    copies.step(on_copies)
                result = on_shards()
                self._marks = self._mark()
            return result

        return self._rescue.commit(vote, both)

    def wait_if_ranks_are_lost(self) -> None:
        """See ``Rescue``."""
        self._rescue.wait_if_ranks_are_lost()

    def leave(self) -> None:
        """This rank's fit ends, and nobody should take it for a death."""
        self._rescue.leave()

    # -- when a rank is lost -----------------------------------------------------------------------------------------

    def _mark(self) -> list[torch.cuda.Event]:
        """Of what the device was asked for so far; none on a host, which has done it."""
        if self._copies_aside is None:
            return []
        mark = torch.cuda.Event()
        mark.record()
        return [mark]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """A stream of its own: kernels on the main thread's may wait for the dead rank forever.

        The newest mark can be behind such a kernel too, of a hook's own exchange. The one before it is not.
        """
        if self._copies_aside is None:
            yield
            return
        with torch.cuda.stream(self._copies_aside.stream):
            with self._calls():
                passed = not self._marks or any(_passes(mark) for mark in self._marks)
            if not passed:
                raise TimeoutError("the device has not ended the last step")
            yield

    def _calls(self) -> AbstractContextManager[None]:
        return nullcontext() if self._copies_aside is None else self._copies_aside.calls()

    def _stuck(self) -> str | None:
        if self._copies_aside is None or not self._copies_aside.is_stuck:
            return None
        return (
            "another thread of it waits in CUDA's driver for the rank that is gone, as tensor.cpu() and "
            "tensor.tolist() do; tensor.item() and copies to pinned memory let others go on"
        )

    def _meet(self) -> None:
        """All ranks have come here, and their devices have done what they were asked for."""
        if self._copies_aside is not None:
            torch.cuda.current_stream().synchronize()
        self._control.gather_counts(torch.zeros(1, dtype=torch.int64), "redundancy")

    def _held(self) -> list[list[dict[int, Values]]]:
        """Of each optimizer, of each of its sharded Parameters, by the rank whose shard it is."""
        return [[self._shards(optimizer, param) for param in sharded(optimizer)] for optimizer in self._optimizers]

    def _shards(self, optimizer: Optimizer, param: nn.Parameter) -> dict[int, Values]:
        state = optimizer.state.get(param, {})
        own = {_WEIGHT: param, **state}
        found = {self._parallelism.state.rank: self._on_host(own)}
        copies = self._copies.get(optimizer)
        if copies is not None:
            weight, copied = copies.parts()[param]
            found[copies.owner] = self._on_host({_WEIGHT: weight, **copied})
        return found

    def _on_host(self, values: Any) -> Any:
        """With every tensor on the host, of shards this rank's part."""

        def moved(tensor: Tensor) -> Tensor:
            local = local_part(tensor).detach()
            return local if self._copies_aside is None else self._copies_aside.to_host(local)

        return apply_to_collection(values, Tensor, moved)

    def _save(self, survivors: Survivors) -> Path:
        assert self._boundary is not None
        steps, progress = self._boundary
        files = [torch.load(file, weights_only=True) for file in survivors.files.values()]
        assembled = self._assembled(files)
        checkpoint = self._on_host({**self._dump(assembled), **progress, STEPS_TAKEN: survivors.steps - steps})
        path = self._folder / f"step-{progress['global_step']}.ckpt"
        self._trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
        for older in set(checkpoints_in(self._folder)) - {path}:
            older.unlink()
        return path

    def _assembled(self, files: Iterable[Any]) -> Assembled:
        merged: list[list[dict[int, Values]]] = [[{} for _ in sharded(opt)] for opt in self._optimizers]
        for held in files:
            for of_optimizer, shards in zip(merged, held, strict=True):
                for known, more in zip(of_optimizer, shards, strict=True):
                    known.update(more)
        assembled = Assembled({}, [{} for _ in self._optimizers])
        for optimizer, of_optimizer, states in zip(self._optimizers, merged, assembled.states, strict=True):
            for param, shards in zip(sharded(optimizer), of_optimizer, strict=True):
                owner = self._of[param]
                whole = _put_together(shards, self._parallelism.group_size)
                assembled.weights[owner] = whole.pop(_WEIGHT)
                states[owner] = whole
        return assembled


def _put_together(shards: Mapping[int, Values], num_ranks: int) -> Values:
    """Whole tensors from those of all ranks, which cut rows of experts."""
    missing = sorted(set(range(num_ranks)) - shards.keys())
    if missing:
        raise RuntimeError(f"nobody that is left holds the shards of rank(s) {missing}: both owners are gone")
    rows = shards[0][_WEIGHT].dim()
    return {
        name: torch.cat([shards[rank][name] for rank in range(num_ranks)], dim=1)
        if isinstance(value, Tensor) and value.dim() == rows
        else value
        for name, value in shards[0].items()
    }


def _passes(mark: torch.cuda.Event) -> bool:
    """Soon. A thread that waits in the driver could keep the main thread from its last words."""
    deadline = time.monotonic() + _PATIENCE_S
    while not mark.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PERIOD_S)
    return True


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
