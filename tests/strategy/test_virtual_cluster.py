"""A virtual cluster of four drops the very tokens that four ranks drop, and learns the same."""

import dataclasses

import numpy as np
import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_swiftmoe import SwiftMoEStrategy, virtual
from lightning_swiftmoe.virtual import VirtualCluster
from tests.jobs import Job, Net, data, largest_error, make_trainer, our_trainer, train
from tests.ranks import run_ranks
from tests.strategy.test_bytes import Recorder

pytestmark = pytest.mark.distributed


def rule(capacity_scope, split):
    return {"capacity_scope": capacity_scope, "split": split}


JOB = Job(
    num_experts=5,
    slots=2,
    steps=6,
    top_k=1,
    policy="proportional",
    moe={"capacity_factor": 1.0},
    strategy=rule("cluster", "even"),
)


def train_recorded(job):
    recorder = Recorder()
    weights = train(dataclasses.replace(job, callbacks=lambda: [recorder]))
    return weights, recorder.steps


def train_virtually(job, num_ranks):
    recorder = Recorder()
    virtual = VirtualCluster(num_ranks, job.slots, policy=job.policy, **job.strategy)
    trainer, module = make_trainer(job, callbacks=[recorder, virtual]), Net(job)
    trainer.fit(module.double(), data(job))
    return module.state_dict(), recorder.steps


@pytest.mark.parametrize(
    ("policy", "top_k", "strategy"),
    [
        ("proportional", 1, rule("cluster", "even")),
        ("static", 1, rule("cluster", "even")),
        ("proportional", 2, rule("cluster", "even")),
        ("static", 2, rule("cluster", "even")),
        ("proportional", 1, rule("cluster", "exact")),
        ("balanced", 2, rule("pooled", "exact")),
        ("random", 1, rule("pooled", "even")),
        ("static", 2, {**rule("cluster", "exact"), "transient_copies": 1}),
        ("random", 1, {**rule("rank", "exact"), "transient_copies": 2}),
    ],
)
def test_same_drops_and_weights(policy, top_k, strategy):
    job = dataclasses.replace(JOB, policy=policy, top_k=top_k, strategy=strategy)
    real_weights, real = run_ranks(4, train_recorded, job)[0]
    virtual_weights, virtual = train_virtually(job, 4)
    assert min(layer.survival for step in real for layer in step.layers) < 0.9
    for one, other in zip(real, virtual, strict=True):
        for a, b in zip(one.layers, other.layers, strict=True):
            assert (a.counts == b.counts).all()
            assert (a.rank_load == b.rank_load).all()
            assert a.next_placement == b.next_placement
    assert largest_error(real_weights, virtual_weights) < 1e-9


class Validates(Net):
    """Notes the loss of validation batches; every rank has its own part."""

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.loss(batch).item())


def fit_and_validate(job, trainer, part, num_parts):
    module = Validates(job).double()
    held_out = DataLoader(list(data(dataclasses.replace(job, steps=2), part, num_parts)), batch_size=None)
    trainer.fit(module, data(job, part, num_parts), held_out)
    return module.seen


def validate_on_ranks(job):
    return fit_and_validate(job, our_trainer(job), dist.get_rank(), dist.get_world_size())


def test_validation_drops_by_the_placement_that_follows_the_last_step():
    job = dataclasses.replace(JOB, policy="random", trainer={"val_check_interval": 2, "num_sanity_val_steps": 0})
    losses = np.mean(run_ranks(4, validate_on_ranks, job), axis=0)
    virtual = make_trainer(job, callbacks=[VirtualCluster(4, job.slots, policy=job.policy, **job.strategy)])
    np.testing.assert_allclose(fit_and_validate(job, virtual, 0, 1), losses, rtol=1e-9)


def test_proportional_keeps_more_than_static():
    kept = {}
    for policy in ("static", "proportional"):
        job = dataclasses.replace(JOB, policy=policy, slots=4, steps=10)
        _, steps = train_virtually(job, 4)
        kept[policy] = np.mean([layer.survival for step in steps[1:] for layer in step.layers])
    assert kept["proportional"] > kept["static"] + 0.05


def test_pooled_slots_and_the_exact_split_keep_the_most():
    kept = {}
    rules = {"paper": rule("cluster", "even"), "pooled": rule("pooled", "even"), "exact": rule("pooled", "exact")}
    for name, strategy in rules.items():
        job = dataclasses.replace(JOB, policy="balanced", slots=4, steps=10, strategy=strategy)
        _, steps = train_virtually(job, 4)
        kept[name] = np.mean([layer.survival for step in steps[1:] for layer in step.layers])
    assert kept["paper"] + 0.05 < kept["pooled"] < kept["exact"] - 0.01
    assert kept["exact"] > 0.98


def test_transient_copies_do_without_replicas():
    kept = []
    for copies in (0, 1):
        options = {**rule("pooled", "exact"), "transient_copies": copies}
        _, steps = train_virtually(dataclasses.replace(JOB, slots=2, steps=10, strategy=options), 4)
        kept.append(np.mean([layer.survival for step in steps for layer in step.layers]))
    assert kept[1] > kept[0] + 0.05
    assert kept[1] > 0.97


def test_copies_are_chosen_where_they_may_pay(monkeypatch):
    said = []
    monkeypatch.setattr(virtual, "rank_zero_info", said.append)
    fewest = {"slots": 2, "steps": 3, "moe": {"capacity_factor": None}}
    chosen = dataclasses.replace(JOB, **fewest, strategy={"transient_copies": "auto"})
    one = dataclasses.replace(JOB, **fewest, strategy={"transient_copies": 1})
    loads = []
    for job in (chosen, one):
        _, steps = train_virtually(job, 4)
        loads.append([layer.rank_load.tolist() for step in steps for layer in step.layers])
    assert said == ["transient_copies='auto': a rank may borrow an expert, for 1,536 assignments or more each"]
    assert loads[0] != loads[1]  # these batches have fewer

    job = dataclasses.replace(JOB, slots=5, steps=1)
    with pytest.warns(UserWarning, match="transient_copies='auto' is off: an expert group is one rank"):
        make_trainer(job, SwiftMoEStrategy(5, transient_copies="auto")).fit(Net(job), data(job))


def test_auto_places_for_the_room_there_is():
    def placements(policy, scope):
        _, steps = train_virtually(dataclasses.replace(JOB, policy=policy, strategy=rule(scope, "exact")), 4)
        return [layer.next_placement for step in steps for layer in step.layers]

    for scope, policy, other in (("cluster", "proportional", "balanced"), ("pooled", "balanced", "proportional")):
        assert placements("auto", scope) == placements(policy, scope) != placements(other, scope)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="7 virtual ranks cannot share 24 tokens evenly"):
        train_virtually(JOB, 7)
