"""Several groups of ranks, each with a whole set of experts: the weights of one process, whatever the grouping."""

import dataclasses
import itertools
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.placement import EvenShards, Placement
from lightning_swiftmoe.trace_file import read_trace
from tests.jobs import Job, Net, adamw, data, full, largest_error, make_trainer, our_trainer, sgd, train, train_alone
from tests.ranks import run_ranks
from tests.strategy.test_bytes import Recorder, record
from tests.strategy.test_checkpoint import moments, save_in_fit

pytestmark = pytest.mark.distributed


def grouped(size, **kwargs):
    strategy = {"expert_parallel_size": size, **kwargs.pop("strategy", {})}
    slots = kwargs.pop("slots", -(-kwargs.get("num_experts", 5) // size) + 1)
    return Job(strategy=strategy, slots=slots, **kwargs)


def compare(num_ranks, job):
    expected = train_alone(job)
    results = run_ranks(num_ranks, train, job)
    for result in results:
        assert largest_error(result, expected) < 1e-9
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)
    return results[0]


@pytest.mark.parametrize(("num_ranks", "size"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_groups_equal_one_process(num_ranks, size, optimizer):
    compare(num_ranks, grouped(size, optimizer=optimizer))


VARIANTS = {
    "clip_norm": {"trainer": {"gradient_clip_val": 0.05}},
    "clip_and_accumulate": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
    "every_loss": {"moe": {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}},
    "bias": {"moe": {"bias_update_rate": 0.01, "score": "sigmoid"}},
    "offload": {"strategy": {"offload_optimizer": True}},
    "auto_slots_balanced": {"slots": "auto", "policy": "balanced"},
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, size):
    compare(4, grouped(size, **VARIANTS[variant]))


def test_one_group_of_all_ranks_is_as_without_groups():
    named = run_ranks(2, train, grouped(2))
    default = run_ranks(2, train, Job(slots=4))
    assert all(torch.equal(named[0][key], default[0][key]) for key in default[0])


@pytest.mark.parametrize("size", [1, 2])
def test_biases_are_those_of_all_tokens(size):
    # A rate so large that any difference in the loads of a step shows in the biases.
    moe = {"bias_update_rate": 0.5, "score": "sigmoid"}
    one_group = run_ranks(4, train, Job(slots=3, moe=moe))[0]
    groups = run_ranks(4, train, grouped(size, moe=moe))
    for key in (key for key in one_group if key.endswith("expert_bias")):
        assert one_group[key].any()
        for result in groups:
            assert torch.allclose(result[key], one_group[key], atol=1e-12)


# -- what users see ----------------------------------------------------------------------------------------------------


class Look(pl.Callback):
    """What a user may ask of an expert gradient."""

    def on_after_backward(self, trainer, pl_module):
        weight = pl_module.moes[0].experts.up_proj
        whole = full(weight.grad).clone()
        pl_module.seen.append(
            {
                "whole": whole,
                "norm": weight.grad.norm().item(),
                "mean": weight.grad.mean().item(),
                "nan": bool(torch.isnan(weight.grad).any()),
                "equal": torch.equal(weight, weight.detach().clone()),
                "rows": torch.equal(full(weight.detach()[:, 1]), full(weight.detach())[:, 1]),
                "mesh": getattr(weight, "device_mesh", None) and tuple(weight.device_mesh.shape),
                "placements": tuple(getattr(weight, "placements", ())),
            }
        )


def look(job):
    trainer, module = our_trainer(job), Net(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return module.seen


@pytest.mark.parametrize(("size", "mesh", "placements"), [(1, None, ()), (2, (2, 2), (Replicate(), Shard(1)))])
def test_users_see_whole_experts_once(size, mesh, placements):
    for seen in run_ranks(4, look, grouped(size, callbacks=lambda: [Look()])):
        for step in seen:
            assert step["norm"] == pytest.approx(step["whole"].norm().item(), rel=1e-12)
            assert step["mean"] == pytest.approx(step["whole"].mean().item(), rel=1e-9, abs=1e-15)
            assert not step["nan"]
            assert step["equal"]
            assert step["rows"]
            assert (step["mesh"], step["placements"]) == (mesh, placements)


# -- what policies, metrics and traces see -----------------------------------------------------------------------------

DROPS = {"policy": "proportional", "top_k": 1, "moe": {"capacity_factor": 0.6}, "optimizer": sgd}


def fit_on(job, part, num_parts):
    """This rank trains on one of so many parts of the data: steps, losses and metrics."""
    recorder = Recorder()
    job = dataclasses.replace(job, callbacks=lambda: [recorder])
    trainer, module = our_trainer(job), Net(job)
    trainer.fit(module, data(job, part, num_parts))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return recorder.steps, module.losses, metrics


def fit_all(job):
    return fit_on(job, dist.get_rank(), dist.get_world_size())


def fit_half(job, half):
    return fit_on(job, 2 * half + dist.get_rank(), 4)


def test_a_group_places_and_drops_as_a_job_of_its_own():
    # In the first step, before gradients of other groups count.
    job = grouped(2, **DROPS, steps=1)
    groups = run_ranks(4, fit_all, job)
    for half in range(2):
        ranks = slice(2 * half, 2 * half + 2)
        alone = run_ranks(2, fit_half, dataclasses.replace(job, strategy={}), half)
        assert [losses for _, losses, _ in groups[ranks]] == [losses for _, losses, _ in alone]
        for layer, expected in zip(groups[0][0][0].layers, alone[0][0][0].layers, strict=True):
            assert layer.counts[ranks].tolist() == expected.counts.tolist()
            assert layer.rank_load[ranks].tolist() == expected.rank_load.tolist()
            assert layer.next_placement.table[ranks].tolist() == expected.next_placement.table.tolist()
            assert expected.survival < 1


@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_hear_of_the_same_step(size):
    (steps, _, metrics), *others = run_ranks(4, fit_all, grouped(size, **DROPS))
    for other, _, other_metrics in others:
        assert {**other_metrics, **_of_a_rank(metrics)} == metrics
        for step, here in zip(steps, other, strict=True):
            for layer, same in zip(step.layers, here.layers, strict=True):
                assert layer.counts.tolist() == same.counts.tolist()
                assert layer.rank_load.tolist() == same.rank_load.tolist()
                assert layer.aux_loss == same.aux_loss
                assert (layer.placement, layer.next_placement) == (same.placement, same.next_placement)
    for step, following in itertools.pairwise(steps):
        for before, after in zip(step.layers, following.layers, strict=True):
            assert before.next_placement == after.placement
    assert steps[-1].layers[0].num_tokens == 24
    routed = sum(int(layer.counts.sum()) for layer in steps[-1].layers)
    processed = sum(int(layer.rank_load.sum()) for layer in steps[-1].layers)
    assert metrics["moe/token_survival"] == pytest.approx(processed / routed)


def _of_a_rank(metrics):
    """Times and bytes are those of one rank."""
    return {name: value for name, value in metrics.items() if "bytes_" in name or "ms_" in name or "_per_s" in name}


def test_a_trace_has_every_rank(tmp_path):
    path = tmp_path / "trace.npy.gz"
    run_ranks(4, train, grouped(2, **DROPS, rebalancer={"trace": path}))
    trace = read_trace(path)
    assert trace["counts"].shape == (5, 2, 4, 5)
    assert (trace["counts"].sum(axis=(2, 3)) == 24).all()
    assert (trace["replicas"].sum(axis=2) == 4 * 4).all()
    assert json.loads(str(trace["meta"]))["tokens_per_rank"] == 6


def moody(loads, cluster, previous):
    """Decides by the rank, which no policy may."""
    experts = np.arange(cluster.num_slots) + (dist.get_rank() == 3)
    return Placement((experts % cluster.num_experts).reshape(previous.table.shape), cluster.num_experts)


def test_ranks_of_a_group_that_decide_differently_are_named():
    sentence = r"'moody' chose other experts on rank\(s\) \[3\] than on rank 2 after step 1, from the same loads"
    with pytest.raises(RuntimeError, match=sentence):
        run_ranks(4, train, grouped(2, policy=moody))


# -- checkpoints -------------------------------------------------------------------------------------------------------

WHOLE = grouped(2, steps=6, policy="proportional")
HALF = dataclasses.replace(WHOLE, trainer={"max_steps": 3})


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("half") / "half.ckpt")
    run_ranks(4, train, HALF, None, path)
    return path


@pytest.fixture(scope="module")
def whole():
    return train_alone(WHOLE)


@pytest.mark.parametrize(("num_ranks", "size"), [(4, 1), (4, 2), (4, 4), (4, None), (2, 2), (2, 1)])
def test_resumed_with_groups_of_any_size(half_way, whole, num_ranks, size):
    job = dataclasses.replace(WHOLE, strategy={"expert_parallel_size": size}, slots="auto")
    for result in run_ranks(num_ranks, train, job, half_way):
        assert largest_error(result, whole) < 1e-9


def test_resumed_in_one_process(half_way, whole):
    assert largest_error(train_alone(WHOLE, half_way), whole) < 1e-9


@pytest.mark.parametrize("size", [1, 2])
def test_written_in_fit_as_one_process_writes_it(tmp_path, whole, size):
    one, groups = str(tmp_path / "one.ckpt"), str(tmp_path / "groups.ckpt")
    train_alone(HALF, save=one)
    run_ranks(4, save_in_fit, grouped(size, steps=6, policy="proportional"), groups)
    expected, found = (torch.load(path, weights_only=True) for path in (one, groups))
    assert largest_error(found["state_dict"], expected["state_dict"]) < 1e-9
    assert largest_error(moments(groups), moments(one)) < 1e-9
    assert largest_error(train_alone(WHOLE, groups), whole) < 1e-9


@pytest.mark.parametrize("size", [1, 2])
def test_resumed_where_every_group_was(tmp_path, size):
    # With a capacity, what is dropped depends on where each group has put its experts, and on the loads of two steps.
    # Not bit for bit: DDP adds up four ranks' dense gradients in another order in the first step of a fit.
    job = grouped(size, **DROPS, steps=6, rebalancer={"every_n_steps": 2})
    path = str(tmp_path / "half.ckpt")
    run_ranks(4, train, dataclasses.replace(job, trainer={"max_steps": 3}), None, path)
    uninterrupted, resumed = run_ranks(4, train, job), run_ranks(4, train, job, path)
    assert largest_error(resumed[0], uninterrupted[0]) < 1e-12


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "size"), [(4, 2), (3, 1)])
def test_closed_formulas(num_ranks, size):
    job = grouped(size, optimizer=sgd)
    cuts = [EvenShards(*matrix, size) for matrix in [(5, 6), (6, 5)]]
    num_groups = num_ranks // size
    for rank, steps in run_ranks(num_ranks, record, job):
        mine = sum(cut.size(rank % size) for cut in cuts)
        others = sum(cut.num_elements for cut in cuts) - mine
        for step in steps[1:-1]:
            exchanged = sum(layer.placement.residents(rank).size * others * 8 for layer in step.layers)
            # A ring all-reduce of this rank's shards of five experts.
            summed = len(step.layers) * (2 * 5 * mine * 8 * (num_groups - 1) // num_groups)
            counts = len(step.layers) * ((size - 1) * 5 * 8 + 2 * 5 * 8 * (num_groups - 1) // num_groups)
            assert step.traffic["gradient"].sent_bytes == exchanged + summed
            assert step.traffic["load"].sent_bytes == counts


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_size_that_does_not_divide_before_any_process_group():
    job = Job()
    trainer = make_trainer(job, SwiftMoEStrategy(expert_parallel_size=3), num_nodes=4)
    with pytest.raises(
        ValueError, match=r"expert_parallel_size = 3 must divide the 4 rank\(s\) of the job: choose one of 1, 2, 4, or"
    ):
        trainer.fit(Net(job), data(job))
    assert not dist.is_initialized()


def test_too_few_slots_for_a_group():
    job = Job()
    trainer = make_trainer(job, SwiftMoEStrategy(slots_per_rank=2, expert_parallel_size=2), num_nodes=4)
    sentence = r"layer 'moes\.0' with expert_parallel_size = 2: 2 ranks x 2 slots .* slots_per_rank that works is 3"
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(Net(job), data(job))
    assert not dist.is_initialized()


@pytest.mark.parametrize("size", [0, -2, 1.5, True, "all"])
def test_a_size_that_is_no_number_of_ranks(size):
    with pytest.raises(ValueError, match=r"expert_parallel_size must be None \(all ranks\) or a positive integer, got"):
        SwiftMoEStrategy(expert_parallel_size=size)


def test_bound_state_has_no_groups():
    with pytest.raises(ValueError, match="expert_parallel_size = 2 needs optimizer_state='decoupled'"):
        SwiftMoEStrategy(expert_parallel_size=2, optimizer_state="bound")
