"""A cell of the table: a job on the ranks of one system, in processes of its own, beside one process."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tests.semantics.peers.systems import ALONE, PATIENCE, Batches, Model, System, make_trainer

TIMEOUT_S = 40.0  # of a job that takes two seconds


class Ended(Exception):
    """A job did not come to its end; the message is the cell's."""


@dataclass
class Result:
    """What a job left on one rank.

    Args:
        weights: whole ones; empty where a strategy gives them to the first rank only.
        seen: what the module noted.
        steps: optimizer steps of the Trainer.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    steps: int = 0


@dataclass(frozen=True)
class Job:
    """What is trained.

    Args:
        module: a row's.
        steps: optimizer steps.
        batches: of an epoch; None: as many as steps.
        callbacks: makes the row's own.
        val_batches: of each rank in turn; empty: nobody validates.
        ckpt_path: to go on from.
        save_to: a checkpoint that is saved behind step ``save_at``.
        save_at: see there.
        trainer: further arguments of the Trainer.
    """

    module: type[Model] = Model
    steps: int = 4
    batches: int | None = None
    callbacks: Callable[[], list[pl.Callback]] = list
    val_batches: tuple[int, ...] = ()
    ckpt_path: str | None = None
    save_to: str | None = None
    save_at: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)


class Watch(pl.Callback):
    """Notes how far training came, saves where the job says so, and takes the weights at the end."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, *_):
        if trainer.is_global_zero:
            (self.folder / "step").write_text(str(trainer.global_step))

    def on_train_batch_end(self, trainer, *_):
        if self.job.save_to is not None and trainer.global_step == self.job.save_at:
            trainer.save_checkpoint(self.job.save_to)

    def on_train_end(self, trainer, pl_module):
        state = trainer.strategy.lightning_module_state_dict()
        self.weights = {name: value.detach().clone() for name, value in state.items() if "expert_bias" not in name}


def fit(system: System, job: Job, folder: Path) -> Result:
    """On one rank."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module, watch = job.module(system), Watch(job, folder)
    trainer = make_trainer(system, max_steps=job.steps, callbacks=[*job.callbacks(), watch], **job.trainer)
    accumulate = job.trainer.get("accumulate_grad_batches", 1)
    batches = Batches(job.batches or job.steps * accumulate, rank, num_ranks)
    # Everybody validates on the same whole batches.
    held_out = None
    if job.val_batches:
        held_out = DataLoader(list(Batches(job.val_batches[rank % len(job.val_batches)], 0, 1)), batch_size=None)
    if module.leaves_unused and system.name == "ddp":
        trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
    trainer.fit(module, batches, held_out, ckpt_path=job.ckpt_path, weights_only=False)
    return Result(watch.weights, module.seen, trainer.global_step)


@dataclass
class Cell:
    """One system in one row.

    Args:
        system: which.
        folder: for files; empty at first.
    """

    system: System
    folder: Path
    jobs: int = 0

    def train(self, job: Job, num_ranks: int = 2, system: System | None = None) -> list[Result]:
        """The job on ranks of the system; results in rank order.

        Raises:
            Ended: it was refused, failed or did not end.
        """
        return self.run(num_ranks, fit, system or self.system, job)

    def alone(self, job: Job) -> Result:
        """The job in one process without a strategy."""
        return self.train(job, 1, ALONE)[0]

    def equals_one_process(self, job: Job | None = None, **options: Any) -> str:
        """The verdict on a job: final weights, and what the module saw, beside one process."""
        job = job or Job(**options)
        expected = self.alone(job)
        return compare(self.train(job), expected, self.system.bound)

    def run(self, num_ranks: int, fn: Callable[..., Any], system: System, *args: Any) -> list[Any]:
        """``fn(system, *args, folder)`` on ranks of their own; results in rank order.

        Raises:
            Ended: see ``train``.
        """
        self.jobs += 1
        folder = self.folder / f"job-{self.jobs}"
        folder.mkdir()
        return run_processes(num_ranks, system is not ALONE, folder, fn, system, *args, folder)


def run_processes(num_ranks: int, distributed: bool, folder: Path, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``fn(*args)`` on forked processes, with a process group if they are distributed.

    Raises:
        Ended: a process raised, was killed, or did not end.
    """
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, num_ranks, distributed, folder, fn, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    # The one that raised first is the cause; others only lost their connection to it, or will when those that hang end.
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    for process in processes:
        process.kill()
        process.join()
    step = (folder / "step").read_text() if (folder / "step").exists() else None
    when = "refused" if step is None else f"fails in step {int(step) + 1}"
    if errors:
        rank = errors[0].name.removeprefix("error-")
        stuck = f"; rank(s) {late} hang" if late else ""
        raise Ended(f"{when}: {errors[0].read_text()}" + (f" (rank {rank}{stuck})" if late else ""))
    if late:
        raise Ended("hangs before training" if step is None else f"hangs in step {int(step) + 1}")
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise Ended(f"a process ended with {codes}")
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(num_ranks)]


def _rank(
    rank: int, num_ranks: int, distributed: bool, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # DeepSpeed asks for these even where a process group is there already.
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    try:
        if distributed:
            rendezvous = f"file://{folder}/rendezvous"
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_ranks, timeout=PATIENCE)
        torch.save(fn(*args), folder / f"result-{rank}")
    except BaseException as error:
        text = str(error).strip()
        line = text.splitlines()[0] if text else ""
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {line}")
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def compare(results: list[Result], expected: Result, bound: float) -> str:
    """The verdict: ``right``, or what differs most. The first rank has all weights, others some or all."""
    off = difference(results[0].weights, expected.weights)
    for result in results[1:]:
        off = max(off, difference(result.weights, {k: v for k, v in expected.weights.items() if k in result.weights}))
    if not off < bound:
        return f"wrong: weights off by {off:.1e}"
    off = max(difference_of_seen(result.seen, expected.seen) for result in results)
    if off == float("inf"):
        return "wrong: the module sees other names or shapes"
    return "right" if off < bound else f"wrong: what the module sees is off by {off:.1e}"


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two weights; infinity where names or shapes differ. Weights are of order 0.1."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in b):
        return float("inf")
    return max(((a[k].double() - b[k].double()).abs().max().item() for k in b), default=0.0)


def difference_of_seen(got: Any, expected: Any) -> float:
    """The same of lists, dictionaries and numbers."""
    if isinstance(expected, (list, tuple, dict)):
        if len(got) != len(expected):
            return float("inf")
        keys = expected.keys() if isinstance(expected, dict) else range(len(expected))
        if isinstance(expected, dict) and got.keys() != expected.keys():
            return float("inf")
        return max((difference_of_seen(got[key], expected[key]) for key in keys), default=0.0)
    if isinstance(expected, torch.Tensor):
        return difference({"": got}, {"": expected})
    if isinstance(expected, float):
        return abs(got - expected) / max(abs(expected), 1e-30)
    return 0.0 if got == expected else float("inf")
