"""Loaders with worker processes and shuffling: every epoch, and going on in the middle of one."""

import dataclasses
import multiprocessing

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_swiftmoe.data.loader import ResumableLoader
from tests.jobs import Job, data, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import ALONE, DDP, OURS, TIMEOUT_S, difference, on, trainer_of

pytestmark = pytest.mark.distributed

# Two epochs of five batches.
JOB = Job(steps=10, slots=4, optimizer=sgd)


def loader(job, cls, **options):
    """Shuffled; batches of all ranks together are those of one process, in another order within a batch."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = data(dataclasses.replace(job, steps=5))
    rows = TensorDataset(batches.x.flatten(0, 1), batches.y.flatten())
    sampler = DistributedSampler(rows, num_ranks, rank, shuffle=True, seed=3)
    return cls(rows, job.batch // num_ranks, sampler=sampler, num_workers=2, multiprocessing_context="fork", **options)


def fit(system, job, cls, options, ckpt_path=None, save_at=None):
    """Weights at the end; a checkpoint behind a step in the middle of the second epoch."""
    # Our ranks are daemons, which Python allows no children; a rank that Lightning starts is none.
    multiprocessing.current_process()._config["daemon"] = False

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == save_at and ckpt_path is None:
                trainer.save_checkpoint(f"{options['folder']}/{system}.ckpt")

    job = dataclasses.replace(system.job(job), callbacks=lambda: [Saves()])
    module = job.module(job)
    persistent = {"persistent_workers": options["persistent"]}
    trainer_of(system, job).fit(module, loader(job, cls, **persistent), ckpt_path=ckpt_path)
    return {"weights": module.state_dict(), "losses": module.losses}


@on([OURS[1], OURS[2], DDP])
@pytest.mark.parametrize("persistent", [False, True])
def test_shuffled_epochs(system, persistent):
    expected = fit(ALONE, system.job(JOB), DataLoader, {"persistent": persistent})["weights"]
    options = {"persistent": persistent}
    for result in run_ranks(system.num_ranks, fit, system, JOB, DataLoader, options, timeout_s=TIMEOUT_S):
        assert difference(result["weights"], expected) < 1e-9


@on([OURS[0], OURS[1]])
@pytest.mark.parametrize("persistent", [False, True])
def test_resumed_in_the_middle_of_an_epoch(system, persistent, tmp_path):
    """Bit for bit, with a loader that has a position."""
    options = {"persistent": persistent, "folder": tmp_path}
    args = (fit, system, JOB, ResumableLoader, options)
    whole = run_ranks(system.num_ranks, *args, None, 7, timeout_s=TIMEOUT_S)
    resumed = run_ranks(system.num_ranks, *args, f"{tmp_path}/{system}.ckpt", timeout_s=TIMEOUT_S)
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"][7:]
        for key, value in before["weights"].items():
            assert torch.equal(after["weights"][key], value), key


def test_a_loader_without_a_position_goes_on_as_in_one_process(tmp_path):
    """Lightning then begins the epoch's order anew: so it does in one process, to the same weights."""
    options = {"persistent": False, "folder": tmp_path}
    fit(ALONE, OURS[1].job(JOB), DataLoader, options, None, 7)
    path = f"{tmp_path}/{ALONE}.ckpt"
    expected = run_ranks(1, resumed_alone, options, path, timeout_s=TIMEOUT_S)[0]
    for result in run_ranks(2, fit, OURS[1], JOB, DataLoader, options, path, timeout_s=TIMEOUT_S):
        assert difference(result["weights"], expected) < 1e-9


def resumed_alone(options, path):
    """In 64 bits from the start: stock strategies load a checkpoint first, and convert afterwards."""
    job = OURS[1].job(JOB)

    class Doubles(job.module):
        def __init__(self, job):
            super().__init__(job)
            self.double()

    return fit(ALONE, dataclasses.replace(job, module=Doubles), DataLoader, options, path)["weights"]
