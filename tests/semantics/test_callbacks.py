"""Code that puts other callbacks into the Trainer while it runs, learning rate finders above all."""

import dataclasses

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from tests.jobs import Job, Net, data, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import ALONE, TIMEOUT_S, check, difference, same, trainer_of

pytestmark = pytest.mark.distributed


class Replaces(Net):
    """Another list for one step, and then the old one."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            self.kept, self.trainer.callbacks = self.trainer.callbacks, []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.trainer.global_step)
        if batch_idx == 1:
            self.trainer.callbacks = self.kept


class Removes(Net):
    """A new list for good."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.trainer.global_step)
        self.trainer.callbacks = []


@pytest.mark.parametrize("module", [Replaces, Removes])
def test_replaced_during_fit(system, module):
    assert check(system, Job(steps=4, optimizer=sgd, module=module))["seen"] == [1, 2, 3, 4]


class Finds(Net):
    """Has the attribute that finders look for."""

    lr = 0.1


class Finder(LearningRateFinder):
    def on_train_end(self, trainer, pl_module):
        pl_module.seen.append(self.optimal_lr.results["lr"])


def finding_job(folder):
    # The rate that is found depends on the first rank's own loss, so nobody takes it over.
    return Job(steps=5, optimizer=sgd, module=Finds, trainer={"default_root_dir": str(folder)})


def test_learning_rate_finder_callback(system, tmp_path):
    job = finding_job(tmp_path)
    job.callbacks = lambda: [Finder(num_training_steps=3, update_attr=False)]
    assert len(check(system, job)["seen"][0]) == 3
    assert not list(tmp_path.rglob("*.ckpt"))


def find_then_fit(system, job):
    job = system.job(job)
    rank, num_ranks = (0, 1) if system is ALONE else (dist.get_rank(), dist.get_world_size())
    trainer, module = trainer_of(system, job), job.module(job)
    batches = DataLoader(list(data(job, rank, num_ranks)), batch_size=None)
    found = Tuner(trainer).lr_find(module, batches, num_training=3, update_attr=False)
    trainer.fit(module, batches)
    return {"weights": module.state_dict(), "seen": [found.results["lr"], trainer.global_step]}


def test_tuner(system, tmp_path):
    job = finding_job(tmp_path)
    expected = find_then_fit(ALONE, system.job(job))
    for result in run_ranks(system.num_ranks, find_then_fit, system, job, timeout_s=TIMEOUT_S):
        assert difference(result["weights"], expected["weights"]) < 1e-9
        same(result["seen"], expected["seen"], 1e-9, str(system))
    # Nothing of the search is left: the weights are those of training alone.
    plain = dataclasses.replace(job, module=Net)
    assert difference(expected["weights"], fit_plainly(system.job(plain))) < 1e-9


def fit_plainly(job):
    module = job.module(job)
    trainer_of(ALONE, job).fit(module, DataLoader(list(data(job)), batch_size=None))
    return module.state_dict()
