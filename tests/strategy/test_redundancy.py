"""``redundancy=2``: every shard has a second owner, bit for bit, and a fit goes on from what is left of it."""

import dataclasses

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from lightning_swiftmoe import SwiftMoEStrategy, WeightEMA
from lightning_swiftmoe.parallel.expert_tensor import local_part
from lightning_swiftmoe.parallel.shard_copies import ShardCopies, sharded
from lightning_swiftmoe.placement import EvenShards
from tests.jobs import Job, Net, adamw, data, largest_error, our_trainer, sgd, train, train_alone, two_groups
from tests.ranks import run_ranks
from tests.semantics.test_fp16 import fit as fit_in_half
from tests.semantics.test_fp16 import half
from tests.semantics.test_schedule_free import ScheduleFree

pytestmark = pytest.mark.distributed

TWICE = {"redundancy": 2}
JOB = Job(slots=3, strategy=TWICE)


class LooksAtCopies(pl.Callback):
    """After training: what this rank owns, and what it holds for another."""

    def on_train_end(self, trainer, module):
        (copies,) = trainer.strategy._redundant._copies.values()
        assert isinstance(copies, ShardCopies)
        self.found = {}
        for rank, parts in ((dist.get_rank(), own_parts(copies.optimizer)), (copies.owner, copies.parts())):
            self.found[rank] = [
                [part.detach().clone(), *(value for value in state.values() if isinstance(value, torch.Tensor))]
                for part, state in parts.values()
            ]


def own_parts(optimizer):
    return {
        param: (
            local_part(param),
            {name: local_part(value) if value.ndim else value for name, value in optimizer.state[param].items()},
        )
        for param in sharded(optimizer)
    }


def fit(job):
    looks = LooksAtCopies()
    job = dataclasses.replace(job, callbacks=lambda: [*JOB.callbacks(), looks])
    trainer, module = our_trainer(job, default_root_dir=job.trainer["default_root_dir"]), job.module(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return module.state_dict(), looks.found


class Edits(Net):
    """Weights and moments are changed by hand between steps, in ways that leave no trace."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 2:
            for param in self.moes[1].experts.parameters():
                local_part(param).data.mul_(0.5)
            for state in self.trainer.optimizers[0].state.values():
                for value in state.values():
                    if value.ndim:
                        local_part(value).data.mul_(0.25)


def schedule_free(module):
    return two_groups(module, ScheduleFree, warmup=3, lr=0.05)


class SwitchedOn(Net):
    def on_train_start(self):
        self.trainer.optimizers[0].train()


CASES = {
    "adam": Job(slots=3),
    "sgd": Job(slots=3, optimizer=sgd),
    "accumulates": Job(slots=3, trainer={"accumulate_grad_batches": 2}),
    "clips": Job(slots=3, trainer={"gradient_clip_val": 0.05}),
    "edited": Job(slots=3, module=Edits, optimizer=adamw),
    "schedule_free": Job(slots=3, module=SwitchedOn, optimizer=schedule_free),
    "bf16": Job(slots=3, precision="bf16-mixed", optimizer=sgd),
}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_copies_are_as_their_owners(tmp_path, case, num_ranks):
    job = CASES[case]
    job = dataclasses.replace(job, strategy=TWICE, trainer={**job.trainer, "default_root_dir": str(tmp_path)})
    results = run_ranks(num_ranks, fit, job)
    owned = {rank: found[rank] for rank, (_, found) in enumerate(results)}
    for rank, (_, found) in enumerate(results):
        (other,) = found.keys() - {rank}
        for mine, copied in zip(owned[other], found[other], strict=True):
            assert len(mine) == len(copied) > 1
            assert all(torch.equal(one, two) for one, two in zip(mine, copied, strict=True))
    if case != "edited":
        bound = 2e-2 if case == "bf16" else 1e-10
        assert largest_error(results[0][0], train_alone(dataclasses.replace(CASES[case]))) < bound


class ReceivesWithoutAStep(pl.Callback):
    """Edits this rank's shards, and sends them to the holder of their copies, who takes no step."""

    def on_train_end(self, trainer, module):
        (copies,) = trainer.strategy._redundant._copies.values()
        before = weights_of(copies)
        for param in sharded(copies.optimizer):
            local_part(param).data.add_(1)
        copies.receive_all()
        self.kept = all(map(torch.equal, before, weights_of(copies)))
        copies.step(lambda: None)
        self.moved = all(torch.equal(one + 1, two) for one, two in zip(before, weights_of(copies), strict=True))


def weights_of(copies):
    return [weight.clone() for weight, _ in copies.parts().values()]


def receive_without_a_step(job):
    receives = ReceivesWithoutAStep()
    train(dataclasses.replace(job, callbacks=lambda: [receives]), default_root_dir=job.trainer["default_root_dir"])
    return receives.kept, receives.moved


def test_what_arrives_counts_with_the_step(tmp_path):
    """The owner may die while it sends: what was there before is whole."""
    job = dataclasses.replace(JOB, trainer={"default_root_dir": str(tmp_path)})
    assert run_ranks(2, receive_without_a_step, job) == [(True, True)] * 2


def sent(job):
    """Bytes of the copies, step by step."""

    class Counts(pl.Callback):
        def on_train_start(self, trainer, module):
            self.bytes = []
            trainer.strategy.engine.observers.append(lambda step: self.bytes.append(step.traffic["copies"].sent_bytes))

    counts = Counts()
    job = dataclasses.replace(job, callbacks=lambda: [counts])
    train(job, default_root_dir=job.trainer["default_root_dir"])
    return counts.bytes


def test_only_gradients_travel(tmp_path):
    """After the first step, which sends weights: a shard of gradients, and nothing where nobody edits."""
    job = dataclasses.replace(JOB, num_experts=4, trainer={"default_root_dir": str(tmp_path)})
    shapes = [param.shape for moe in Net(job).moes for param in moe.experts.parameters()]
    for rank, (first, *later) in enumerate(run_ranks(2, sent, job)):
        own = sum(experts * EvenShards(rows, cols, 2).size(rank) for experts, rows, cols in shapes)
        assert later == [own * 8] * 4
        assert first == 2 * later[0]


class ForgetsExperts(Net):
    def configure_optimizers(self):
        self.moes[0].experts.requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strategy": {**TWICE, "optimizer_state": "bound"}}, "redundancy=2 needs optimizer_state='decoupled'"),
        ({"callbacks": lambda: [WeightEMA(0.9)]}, "no second owner for WeightEMA's averages"),
        ({"module": ForgetsExperts}, r"none holds moes\.0\.experts"),
        ({"trainer": {"default_root_dir": "memory://there"}}, "got 'memory://there': give the Trainer a folder"),
        ({"trainer": {"default_root_dir": "/proc/there"}}, "/proc/there"),
    ],
)
def test_refused(change, said):
    with pytest.raises(RuntimeError, match=said):
        run_ranks(2, train, dataclasses.replace(JOB, **change))


def test_no_loss_scale():
    with pytest.raises(RuntimeError, match="redundancy=2 does not know of fp16's loss scale"):
        run_ranks(2, fit_in_half, dataclasses.replace(JOB, precision="16-mixed"), half())


def test_there_are_one_or_two_owners():
    with pytest.raises(ValueError, match="redundancy must be 1 or 2, got 3"):
        SwiftMoEStrategy(redundancy=3)


def test_one_rank_needs_nobody(tmp_path):
    job = dataclasses.replace(JOB, slots=5, trainer={"default_root_dir": str(tmp_path)})
    assert largest_error(run_ranks(1, train, job)[0], train_alone(job)) < 1e-12
    assert not list(tmp_path.iterdir())
