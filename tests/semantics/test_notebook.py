"""An interactive session: ranks are forked from it, and its module holds the weights afterwards, cell after cell."""

import pytest
import torch
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_swiftmoe  # noqa: F401
from tests.jobs import Job, Net, data, largest_error, make_trainer, sgd

pytestmark = pytest.mark.distributed

JOB = Job(steps=4, optimizer=sgd, policy="auto")


class Cells(Net):
    def __init__(self, job):
        super().__init__(job)
        self.double()

    def train_dataloader(self):
        return data(self.job, self.global_rank, self.trainer.world_size)


@pytest.fixture(autouse=True)
def _interactive(monkeypatch):
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)


def test_two_fits():
    module, alone = Cells(JOB), Cells(JOB)
    for _ in range(2):
        make_trainer(JOB, "swiftmoe_notebook", devices=2).fit(module)
        make_trainer(JOB).fit(alone)
        assert largest_error(module.state_dict(), alone.state_dict()) < 1e-9
    assert module.moes[0].experts.up_proj.shape == (5, 5, 6)
    assert torch.isfinite(module.loss(next(iter(data(JOB)))))  # the module is of use in the session


@pytest.mark.parametrize("strategy", ["swiftmoe", "swiftmoe_spawn"])
def test_other_ways_to_start_are_refused(strategy):
    with pytest.raises(MisconfigurationException, match="not compatible with an interactive environment"):
        make_trainer(JOB, strategy, devices=2)
