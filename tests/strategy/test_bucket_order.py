"""A backward of zeros gives DDP its buckets before the first step, and no hook tells of it."""

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from tests.jobs import Job, Net, data, our_trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Listens(Net):
    """Notes what hooks hear of a dense weight; another one is frozen."""

    def __init__(self, job):
        super().__init__(job)
        self.heard = []
        self.inp.weight.register_hook(lambda grad: self.heard.append("gradient"))
        self.inp.weight.register_post_accumulate_grad_hook(lambda param: self.heard.append("accumulated"))
        self.out.bias.requires_grad_(False)


class Looks(pl.Callback):
    """Notes the buckets of every step."""

    def __init__(self):
        self.buckets = []

    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, self.reduce)

    def on_train_batch_start(self, trainer, *_):
        self.buckets.append([])

    def reduce(self, state, bucket):
        self.buckets[-1].append([tuple(param.shape) for param in bucket.parameters()])
        return default_hooks.allreduce_hook(state, bucket)


def look(strategy):
    looks = Looks()
    job = Job(steps=3, slots=3, callbacks=lambda: [looks], strategy=strategy)
    module, trainer = Listens(job), our_trainer(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return module.heard, looks.buckets


@pytest.mark.parametrize("strategy", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
def test_nobody_hears_of_it(strategy):
    for heard, buckets in run_ranks(2, look, strategy):
        assert heard == ["gradient", "accumulated"] * 3
        assert len(buckets) == 3


def test_the_first_step_has_the_buckets_of_all_others():
    for _, (first, second, third) in run_ranks(2, look, {"bucket_cap_mb": 1e-5}):
        assert len(first) > 1
        assert first == second == third
        assert first[0] == [(1, 6)]  # the last that is trained: its gradient comes first
