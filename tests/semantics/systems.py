"""One job in one process, under DDP and under our strategy; what is compared, and how closely."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from tests.jobs import Job, Net, data, make_trainer, our_trainer
from tests.ranks import Ranks, run_ranks


@dataclass(frozen=True)
class System:
    """Who trains, on how many ranks. DDP replicates every layer; ``alone`` is one process without a strategy.

    Args:
        name: ``"alone"``, ``"ddp"`` or ``"ours"``.
        num_ranks: how many train.
        slots: per rank; None leaves one more than needed.
        group_size: ranks that share one set of experts; None: all.
    """

    name: str
    num_ranks: int
    slots: int | None = None
    group_size: int | None = None

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f"in{self.num_ranks // self.group_size}"
        return f"{self.name}{self.num_ranks}{groups}"

    def job(self, job: Job) -> Job:
        """``job`` on this system: room for every expert, and no global auxiliary loss where replicas have none."""
        sharers = self.group_size or self.num_ranks
        job = dataclasses.replace(job, slots=self.slots or -(-job.num_experts // sharers) + 1)
        if self.name == "ddp":
            # A replica sees its own tokens only. All other losses are means, which DDP's mean over ranks leaves right.
            job = dataclasses.replace(job, moe={**job.moe, "aux_loss_coef": 0.0})
        return job


TIMEOUT_S = 30  # of a fit that takes one

ALONE = System("alone", 1)
OURS = [System("ours", n) for n in (1, 2, 3)]  # on three ranks no matrix divides: 5 rows are 2, 2 and 1
SHARDED = OURS[1:]
GROUPS = [System("ours", 4, group_size=2), System("ours", 2, group_size=1)]
DDP = System("ddp", 2)


def at_first(systems: list[System]) -> list[Any]:
    """All of them, but two even ranks only exhaustively where three uneven ones, who find more, stand beside them."""
    spare = OURS[1] if OURS[2] in systems else None
    return [pytest.param(s, marks=pytest.mark.exhaustive) if s == spare else s for s in systems]


def on(systems: list[System]) -> pytest.MarkDecorator:
    """These systems instead of all of them."""
    return pytest.mark.parametrize("system", at_first(systems), ids=str)


class Baseline(pl.Callback):
    """What our strategy does by itself: the auxiliary losses of ``n`` micro-batches count once."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        micro_batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        for moe in pl_module.moes:
            moe.aux_loss_scale = 1 / micro_batches


def trainer_of(system: System, job: Job) -> pl.Trainer:
    """A Trainer on this rank."""
    # Frozen and toggled parameters are "unused" to DDP, which finds that out only on demand; ours is one for the rest.
    options = {"timeout": timedelta(seconds=20), "find_unused_parameters": True, **job.strategy}
    if system.name == "ours":
        options["expert_parallel_size"] = system.group_size
        return our_trainer(dataclasses.replace(job, strategy=options))
    strategy: Any = "auto"
    kwargs: dict[str, Any] = {}
    if system.name == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo", **options)
        kwargs = {"num_nodes": dist.get_world_size(), "plugins": [Ranks()]}
    return make_trainer(job, strategy, callbacks=[*job.callbacks(), Baseline()], **kwargs)


def fit(system: System, job: Job) -> dict[str, Any]:
    """On this rank: train; the weights afterwards, and what the module noted in ``seen``."""
    job = system.job(job)
    rank, num_ranks = (0, 1) if system.name == "alone" else (dist.get_rank(), dist.get_world_size())
    module = job.module(job)
    # Everybody validates on the same whole batch: then every rank must see the loss of one process.
    held_out = DataLoader(list(data(dataclasses.replace(job, steps=1))), batch_size=None)
    validates = "val_check_interval" in job.trainer
    trainer_of(system, job).fit(module, data(job, rank, num_ranks), held_out if validates else None)
    weights = {k: v for k, v in module.state_dict().items() if not k.endswith("expert_bias")}
    return {"weights": weights, "seen": module.seen}


def alone(system: System, job: Job) -> dict[str, Any]:
    """What one process makes of the job that ``system`` is given."""
    return fit(ALONE, system.job(job))


def check(system: System, job: Job, bound: float = 1e-9, without: type[Net] | None = None) -> dict[str, Any]:
    """Train ``job`` on ``system`` and in one process: weights and ``seen`` must be equal on every rank.

    Args:
        system: who trains.
        job: what.
        bound: of relative differences; integers, booleans and strings must be equal.
        without: a module that leaves out what the test is about; its weights must differ, or the test shows nothing.

    Returns:
        what one process found.
    """
    expected = alone(system, job)
    if without is not None:
        other = alone(system, dataclasses.replace(job, module=without))
        assert difference(other["weights"], expected["weights"]) > 1e-4, "the test is about nothing"
    for rank, result in enumerate(run_ranks(system.num_ranks, fit, system, job, timeout_s=TIMEOUT_S)):
        where = f"rank {rank} of {system}"
        assert difference(result["weights"], expected["weights"]) < bound, where
        same(result["seen"], expected["seen"], bound, where)
    return expected


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative norm of a difference over all tensors."""
    assert a.keys() == b.keys()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-30)).item() for k in b)


def same(got: Any, expected: Any, bound: float, where: str) -> None:
    """Equal values; numbers and tensors within ``bound``, relative.

    Raises:
        AssertionError: they differ; says where.
    """
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            same(got[key], value, bound, f"{where}: {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), where
        for i, value in enumerate(expected):
            same(got[i], value, bound, f"{where}: {i}")
    elif isinstance(expected, torch.Tensor) and expected.is_floating_point():
        assert type(got) in (torch.Tensor, torch.nn.Parameter), where
        assert got.shape == expected.shape, where
        assert (got - expected).norm() <= bound * expected.norm() + 1e-12, where
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=bound, abs=1e-12, nan_ok=True), where
    else:
        assert type(got) is type(expected), where
        assert got == expected, where
