"""A run that goes on draws the numbers that the run which nobody stopped would have drawn."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from tests.jobs import Job, Net, SaveAt, data, our_trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Noisy(Net):
    """Dropout, and noise from Python's and NumPy's own generators."""

    def forward(self, x):
        noise = random.random() + np.random.rand()  # noqa: NPY002 the numbers that are to be put back
        return super().forward(F.dropout(x, 0.3) + 0.01 * noise)


JOB = Job(module=Noisy, slots=5, steps=6)


def fit(job, path=None):
    """The losses and what is drawn afterwards."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    module = job.module(job)
    torch.manual_seed(40 + rank if path is None else 70 + rank)
    trainer = our_trainer(job)
    trainer.fit(module, data(job, rank, dist.get_world_size()), ckpt_path=path)
    return module.losses, (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("checkpoint", ["full", "sharded"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_resumed_bit_for_bit(tmp_path, num_ranks, checkpoint):
    job = dataclasses.replace(JOB, strategy={"checkpoint": checkpoint})
    path = str(tmp_path / "3.ckpt")
    saving = dataclasses.replace(job, callbacks=lambda: [SaveAt(path, 3)])
    whole = run_ranks(num_ranks, fit, saving)
    resumed = run_ranks(num_ranks, fit, job, path)
    for (losses, drawn), (resumed_losses, resumed_drawn) in zip(whole, resumed, strict=True):
        assert resumed_losses == losses[3:]
        assert resumed_drawn == drawn
    first = [losses for losses, _ in whole]
    assert all(one != other for one, other in itertools.pairwise(first))


class Epochs(Noisy):
    """Two epochs of three batches whose order is drawn when an epoch begins."""

    def train_dataloader(self):
        whole = data(dataclasses.replace(self.job, steps=3), dist.get_rank(), dist.get_world_size())
        rows = torch.utils.data.TensorDataset(whole.x.flatten(0, 1), whole.y.flatten())
        return torch.utils.data.DataLoader(rows, whole.x.shape[1], shuffle=True)


def fit_epochs(job, path=None):
    torch.manual_seed(dist.get_rank())
    module = job.module(job)
    trainer = our_trainer(job)
    trainer.fit(module, ckpt_path=path)
    return module.losses


def test_behind_the_last_batch_of_an_epoch(tmp_path):
    """The order of the next one is drawn from the numbers that were saved, and once."""
    job = dataclasses.replace(JOB, module=Epochs)
    path = str(tmp_path / "3.ckpt")
    whole = run_ranks(2, fit_epochs, dataclasses.replace(job, callbacks=lambda: [SaveAt(path, 3)]))
    for losses, resumed in zip(whole, run_ranks(2, fit_epochs, job, path), strict=True):
        assert resumed == losses[3:]


def test_another_number_of_ranks_has_numbers_of_its_own(tmp_path):
    """Nobody's are put back: two ranks would draw the same."""
    path = str(tmp_path / "3.ckpt")
    run_ranks(2, fit, dataclasses.replace(JOB, callbacks=lambda: [SaveAt(path, 3)]))
    losses = [losses for losses, _ in run_ranks(3, fit, JOB, path)]
    assert losses[0] != losses[1] != losses[2]
