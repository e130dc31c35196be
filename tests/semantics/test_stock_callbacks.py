"""Lightning's callbacks that watch the Trainer or set its numbers."""

import csv

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, DeviceStatsMonitor, GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_swiftmoe import SwiftMoEStrategy
from tests.jobs import Job, Net, data, sgd
from tests.semantics.systems import check

pytestmark = pytest.mark.distributed


class Counts(Net):
    """Optimizer steps behind every batch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.trainer.global_step)


def test_accumulation_schedule(system):
    """One, three and two micro-batches in epochs of five batches, which two and three do not divide."""
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})
    trainer = {"max_steps": -1, "max_epochs": 3}
    job = Job(steps=5, optimizer=sgd, module=Counts, trainer=trainer, callbacks=lambda: [scheduler])
    seen = check(system, job)["seen"]
    assert seen == [1, 2, 3, 4, 5, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10]


def test_device_stats(system, tmp_path):
    """Only numbers of this machine are logged beside what is logged anyway; weights are those of one process."""
    pytest.importorskip("psutil", reason="DeviceStatsMonitor asks for it")
    logger = CSVLogger(tmp_path)
    job = Job(
        steps=3,
        trainer={"logger": logger, "log_every_n_steps": 1},
        callbacks=lambda: [DeviceStatsMonitor(cpu_stats=True)],
    )
    check(system, job)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        names = next(csv.reader(file))
    assert any("on_train_batch_end" in name and "cpu_percent" in name for name in names)


class HasBatchSize(Net):
    def __init__(self, job):
        super().__init__(job)
        self.batch_size = 4

    def train_dataloader(self):
        return data(self.job)


@pytest.mark.parametrize("by_tuner", [False, True])
def test_batch_size_finder_is_refused_by_lightning(by_tuner):
    """As for any strategy of several processes: a size that fits one rank's memory may not fit another's."""
    module = HasBatchSize(Job())
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": 1}
    callbacks = [] if by_tuner else [BatchSizeFinder()]
    trainer = pl.Trainer(strategy=SwiftMoEStrategy(slots_per_rank=5), callbacks=callbacks, **options)
    with pytest.raises((MisconfigurationException, ValueError), match="not supported with distributed strategies"):
        Tuner(trainer).scale_batch_size(module) if by_tuner else trainer.fit(module)
    assert module.losses == []
