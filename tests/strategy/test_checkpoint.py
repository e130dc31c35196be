"""Checkpoints are canonical: they resume bit for bit on as many ranks, and to rounding on any other number."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.jobs import Job, Net, SaveAt, data, largest_error, our_trainer, train, train_alone
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

FULL = Job(num_experts=5, slots=3, policy="proportional", precision="64-true", steps=6)
HALF = Job(num_experts=5, slots=3, policy="proportional", precision="64-true", steps=6, trainer={"max_steps": 3})


def moments(path):
    """Optimizer state of a checkpoint as named tensors."""
    states = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    return {f"{i}.{k}": v for i, state in states.items() for k, v in state.items() if v.ndim}


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("half") / "half.ckpt")
    run_ranks(2, save_in_fit, HALF, path)
    return path


def resume(path, save, job=FULL):
    slots = max(job.slots, -(-job.num_experts // dist.get_world_size()))
    return train(dataclasses.replace(job, slots=slots), ckpt_path=path, save=save)


def test_same_ranks_bit_for_bit(half_way, tmp_path):
    uninterrupted = run_ranks(2, train, FULL, None, str(tmp_path / "whole.ckpt"))
    resumed = run_ranks(2, resume, half_way, str(tmp_path / "resumed.ckpt"))
    for key, value in uninterrupted[0].items():
        assert torch.equal(resumed[0][key], value), key
    first, second = moments(tmp_path / "whole.ckpt"), moments(tmp_path / "resumed.ckpt")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def losses_and_weights(job, path=None):
    module, trainer = Net(job), our_trainer(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=path)
    return module.losses, module.state_dict()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("wide", [False, True])
def test_losses_and_weights_of_every_later_step_bit_for_bit(tmp_path, num_ranks, wide):
    """Also where sums over ranks depend on where in a bucket an element lies, and with several buckets."""
    strategy = {"bucket_cap_mb": 0.004} if wide else {}
    job = dataclasses.replace(FULL, slots=5, width=48 if wide else 6, strategy=strategy)
    path = str(tmp_path / "3.ckpt")
    whole = run_ranks(num_ranks, losses_and_weights, dataclasses.replace(job, callbacks=lambda: [SaveAt(path, 3)]))
    resumed = run_ranks(num_ranks, losses_and_weights, job, path)
    for (losses, weights), (resumed_losses, resumed_weights) in zip(whole, resumed, strict=True):
        assert resumed_losses == losses[3:]
        for key, value in weights.items():
            assert torch.equal(resumed_weights[key], value), key


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_other_ranks_to_rounding(half_way, tmp_path, num_ranks):
    run_ranks(2, train, FULL, None, str(tmp_path / "whole.ckpt"))
    result = run_ranks(num_ranks, resume, half_way, str(tmp_path / "other.ckpt"))[0]
    expected = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    assert largest_error(result, expected) < 1e-10
    assert largest_error(moments(tmp_path / "other.ckpt"), moments(tmp_path / "whole.ckpt")) < 1e-9


def test_one_process_without_the_strategy(half_way, tmp_path):
    whole, alone = str(tmp_path / "whole.ckpt"), str(tmp_path / "alone.ckpt")
    run_ranks(2, train, FULL, None, whole)
    result = train_alone(FULL, half_way, alone)
    assert largest_error(result, torch.load(whole, weights_only=True)["state_dict"]) < 1e-10
    assert largest_error(moments(alone), moments(whole)) < 1e-9


def test_from_one_process_to_ranks(tmp_path):
    path = str(tmp_path / "alone.ckpt")
    train_alone(HALF, save=path)
    whole = train_alone(FULL)
    result = run_ranks(3, resume, path, str(tmp_path / "ranks.ckpt"))[0]
    assert largest_error(result, whole) < 1e-10


def test_the_file_is_an_ordinary_checkpoint(half_way):
    module = Net.load_from_checkpoint(half_way, job=FULL, weights_only=True)
    assert module.moes[0].experts.up_proj.shape == (5, 5, 6)
    content = torch.load(half_way, weights_only=True)
    assert (
        content["optimizer_states"][0]["state"][4]["exp_avg"].shape
        == content["state_dict"]["moes.0.experts.up_proj"].shape
    )


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_master_weights_survive(tmp_path, precision):
    job = Job(slots=3, precision=precision, steps=6, policy="random")
    half = Job(slots=3, precision=precision, steps=6, policy="random", trainer={"max_steps": 3})
    whole = run_ranks(2, train, job)[0]
    path = str(tmp_path / "half.ckpt")
    run_ranks(2, save_in_fit, half, path)
    resumed = run_ranks(2, resume, path, str(tmp_path / "end.ckpt"), job)[0]
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def save_in_fit(job, path):
    train(dataclasses.replace(job, callbacks=lambda: [SaveAt(path, 3)]))
