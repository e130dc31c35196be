"""What is counted once: auxiliary losses of accumulated batches, and drops of a rank that is alone."""

import dataclasses

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.placement import TokenRule, uniform
from lightning_swiftmoe.trace_file import read_trace
from lightning_swiftmoe.virtual import VirtualCluster
from tests.jobs import Job, Net, data, make_trainer, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import OURS, alone, difference, fit, on

LOSSES = {"aux_loss_coef": 0.3, "z_loss_coef": 0.05}


def by_hand(schedule):
    """The loop: of ``n`` micro-batches each loss and each auxiliary loss counts ``1/n``.

    Args:
        schedule: micro-batches of each optimizer step, and what their losses are divided by.
    """
    module = Net(Job(moe=LOSSES)).double()
    optimizer = sgd(module)
    batches = iter(data(Job(steps=sum(len(step) for step in schedule))))
    for step in schedule:
        optimizer.zero_grad()
        for n in step:
            for moe in module.moes:
                # Not through aux_loss_scale, which is what is tested.
                moe.aux_loss_coef, moe.z_loss_coef = (c / n for c in (LOSSES["aux_loss_coef"], LOSSES["z_loss_coef"]))
            (module.loss(next(batches)) / n).backward()
        optimizer.step()
    return module.state_dict()


def by_trainer(num_batches, **kwargs):
    """A plain Trainer without strategy or callbacks of ours."""
    module = Net(Job(moe=LOSSES, optimizer=sgd)).double()
    options = {"accelerator": "cpu", "devices": 1, "precision": "64-true", "logger": False, "max_epochs": 1}
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(**options, **quiet, **kwargs).fit(module, data(Job(steps=num_batches)))
    return module.state_dict()


def test_accumulation_in_a_plain_trainer():
    found = by_trainer(6, accumulate_grad_batches=2)
    assert difference(found, by_hand([[2, 2]] * 3)) < 1e-9
    assert difference(by_hand([[1, 1]] * 3), by_hand([[2, 2]] * 3)) > 1e-3


def test_an_epoch_that_does_not_divide():
    # Lightning steps on what it has, and divides by n all the same.
    assert difference(by_trainer(5, accumulate_grad_batches=2), by_hand([[2, 2], [2, 2], [2]])) < 1e-9


def test_no_accumulation_in_a_plain_trainer():
    assert difference(by_trainer(3), by_hand([[1]] * 3)) < 1e-12


def test_accumulation_schedule_in_a_plain_trainer():
    scheduler = GradientAccumulationScheduler({0: 3})
    assert difference(by_trainer(6, callbacks=[scheduler]), by_hand([[3, 3, 3]] * 2)) < 1e-9


class ByHand(Net):
    """In manual optimization losses are the user's business, and so is the scale."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for moe in self.moes:
            moe.aux_loss_scale = 0.5
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_a_scale_set_by_hand_stays():
    job = Job(steps=6, moe=LOSSES, optimizer=sgd, trainer={"max_steps": 3})
    module = ByHand(job).double()
    make_trainer(job).fit(module, data(job))
    assert difference(module.state_dict(), by_hand([[2, 2]] * 3)) < 1e-9


@pytest.mark.distributed
@on(OURS)
def test_under_the_strategy(system):
    job = Job(steps=3, moe=LOSSES, optimizer=sgd, trainer={"accumulate_grad_batches": 2})
    for result in run_ranks(system.num_ranks, fit, system, job):
        assert difference(result["weights"], by_hand([[2, 2]] * 3)) < 1e-9


CAPPED = Job(
    steps=5,
    top_k=1,
    optimizer=sgd,
    policy="proportional",
    moe={"capacity_factor": 1.0},
    strategy={"capacity_scope": "rank"},
)


@pytest.mark.distributed
@on(OURS)
def test_capacity_scope_rank(system, tmp_path):
    # More slots than experts: the cluster's rule would keep other tokens.
    system = dataclasses.replace(system, slots=8)
    job = dataclasses.replace(CAPPED, rebalancer={"trace": tmp_path / "trace.npy.gz"})
    results = run_ranks(system.num_ranks, fit, system, job)
    trace = read_trace(tmp_path / "trace.npy.gz")
    placement = uniform(ClusterShape(system.num_ranks, 8, 5, True))
    dropped = 0
    for counts, rank_load in zip(trace["counts"], trace["rank_load"], strict=True):
        for layer in range(2):
            kept = TokenRule("rank", "even").share_out(counts[layer].astype(np.int64), placement, 1.0).kept.sum()
            assert rank_load[layer].sum() == kept
            dropped += counts[layer].sum() - kept
    assert dropped > 20
    # The same drops in one process that acts as so many ranks.
    virtual = VirtualCluster(system.num_ranks, 8, capacity_scope="rank", policy="proportional")
    module = Net(job)
    make_trainer(job, callbacks=[virtual]).fit(module, data(job))
    for result in results:
        assert difference(result["weights"], module.state_dict()) < 1e-9


@pytest.mark.distributed
def test_capacity_scope_rank_on_one_rank_is_a_plain_layer():
    # DeepSpeed's rule with one rank: ceil(factor * tokens / E) of each expert, as a layer without a strategy.
    system = dataclasses.replace(OURS[0], slots=8)
    for result in run_ranks(1, fit, system, CAPPED):
        assert difference(result["weights"], alone(system, CAPPED)["weights"]) < 1e-9
