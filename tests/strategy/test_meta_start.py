"""Modules on the meta device: the same weights on any number of ranks, and on none of them all."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_swiftmoe.parallel.meta_start import draw_expert
from tests.jobs import Job, Net, data, largest_error, our_trainer, sgd
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Meta(Net):
    """Everything is on the meta device, with tied layers and a buffer."""

    def __init__(self, job):
        with torch.device("meta"):
            super().__init__(job)
            self.again = nn.Linear(job.width, job.width, bias=False)
            self.once_more = nn.Linear(job.width, job.width, bias=False)
            self.once_more.weight = self.again.weight
            self.norm = nn.BatchNorm1d(job.width, affine=False)

    def forward(self, x):
        hidden = self.once_more(self.again(self.inp(x)))
        for moe in self.moes:
            hidden = hidden + moe(torch.tanh(hidden))
        return self.out(hidden)


class MetaFrozen(Meta):
    """Some experts do not train."""

    def __init__(self, job):
        super().__init__(job)
        self.moes[0].experts.down_proj.requires_grad_(False)


JOB = Job(slots=3, steps=3, optimizer=sgd, module=Meta, moe={"bias_update_rate": 1e-3})


def fit(job, path, rounds=1, resume=None):
    """Train, more than once if asked; then save, and validate."""
    torch.manual_seed(100 + dist.get_rank() if dist.get_rank() else 7)  # rank 0's counts
    trainer, module = our_trainer(job), job.module(job)
    batches = data(job, dist.get_rank(), dist.get_world_size())
    trainer.fit(module, batches, ckpt_path=resume)
    for _ in range(rounds - 1):
        trainer = our_trainer(job)
        trainer.fit(module, batches)
    experts = [param.is_meta for moe in module.moes for param in moe.experts.parameters()]
    dense = [param.is_meta for name, param in module.named_parameters() if "experts" not in name]
    trainer.save_checkpoint(path)
    (metrics,) = trainer.validate(module, batches, verbose=False)
    state = module.state_dict()
    whole = {name: value.clone() for name, value in state.items() if value.is_floating_point()}
    assert module.again.weight is module.once_more.weight
    return whole, metrics, all(experts), any(dense)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer": Job.optimizer},
        {"module": MetaFrozen},
        {"strategy": {"offload_optimizer": True}},
        {"strategy": {"optimizer_state": "bound"}},
        {"strategy": {"checkpoint": "sharded"}},
    ],
    ids=["sgd", "adamw", "frozen", "offload", "bound", "sharded"],
)
def test_any_number_of_ranks(tmp_path, change):
    job = dataclasses.replace(JOB, **change)
    ((one, metrics, *_),) = run_ranks(1, fit, dataclasses.replace(job, slots=6), tmp_path / "one")
    for num_ranks in (2, 3):
        results = run_ranks(num_ranks, fit, job, tmp_path / f"{num_ranks}")
        for weights, others, experts_are_meta, dense_is_meta in results:
            assert experts_are_meta
            assert not dense_is_meta
            assert largest_error(weights, one) < 1e-12
            assert others == pytest.approx(metrics)


def test_a_second_fit_goes_on(tmp_path):
    ((twice, *_),) = run_ranks(1, fit, dataclasses.replace(JOB, slots=6), tmp_path / "one", 2)
    ((once, *_),) = run_ranks(1, fit, dataclasses.replace(JOB, slots=6), tmp_path / "once")
    assert largest_error(twice, once) > 1e-3
    for weights, *_ in run_ranks(2, fit, JOB, tmp_path / "two", 2):
        assert largest_error(weights, twice) < 1e-12


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_checkpoints_of_both_kinds_go_on_with_other_ranks(tmp_path, kind):
    job = dataclasses.replace(JOB, strategy={"checkpoint": kind})
    run_ranks(2, fit, job, tmp_path / "saved")
    longer = dataclasses.replace(job, steps=6)
    ((one, *_),) = run_ranks(1, fit, dataclasses.replace(longer, slots=6), tmp_path / "1", 1, tmp_path / "saved")
    ((fresh, *_),) = run_ranks(1, fit, dataclasses.replace(job, slots=6), tmp_path / "fresh")
    assert largest_error(one, fresh) > 1e-3
    for weights, *_ in run_ranks(3, fit, longer, tmp_path / "3", 1, tmp_path / "saved"):
        assert largest_error(weights, one) < 1e-12


def test_expert_groups(tmp_path):
    ((one, *_),) = run_ranks(1, fit, dataclasses.replace(JOB, slots=6), tmp_path / "one")
    for size, slots in ((2, 3), (1, 6)):
        job = dataclasses.replace(JOB, slots=slots, strategy={"expert_parallel_size": size})
        for weights, *_ in run_ranks(4, fit, dataclasses.replace(job, batch=24), tmp_path / f"{size}"):
            assert largest_error(weights, one) < 1e-12


def test_experts_are_drawn_as_the_layer_draws_them():
    job = dataclasses.replace(JOB, num_experts=40)
    real, meta = Net(job), Meta(job)
    experts = meta.moes[0].experts
    for key, param in real.moes[0].experts.named_parameters():
        drawn = [draw_expert(experts, "a", key, expert, 3, torch.device("cpu")) for expert in range(40)]
        assert len({float(matrix[0, 0]) for matrix in drawn}) == 40
        flat, other = torch.stack(drawn).flatten(), param.detach().flatten()
        assert float(flat.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.01)
        assert float(flat.std()) == pytest.approx(float(other.std()), rel=0.05)
        assert torch.equal(drawn[5], draw_expert(experts, "a", key, 5, 3, torch.device("cpu")))
        for name, seed in (("b", 3), ("a", 4)):
            assert not torch.equal(drawn[5], draw_expert(experts, name, key, 5, seed, torch.device("cpu")))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))


class Uninitialized(Meta):
    def __init__(self, job):
        super().__init__(job)
        with torch.device("meta"):
            self.scale = Scale()


def test_what_nobody_initialises_is_refused(tmp_path):
    message = r"scale\.factor was built on the meta device and nobody initialises it: give Scale a method"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, fit, dataclasses.replace(JOB, module=Uninitialized), tmp_path / "never")


class Shapes(TorchDispatchMode):
    """Of all tensors with memory that anything makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta:
                self.seen.add(tuple(tensor.shape))
        return result


def shapes_in_fit(job, path=None):
    trainer, module = our_trainer(job), job.module(job)
    whole = {tuple(param.shape) for moe in module.moes for param in moe.experts.parameters()}
    with Shapes() as shapes:
        trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=path)
    return whole, shapes.seen


@pytest.mark.parametrize("strategy", [{}, {"offload_optimizer": True}], ids=str)
def test_no_rank_ever_holds_all_experts_of_a_layer(strategy):
    job = dataclasses.replace(JOB, num_experts=8, slots=4, strategy=strategy)
    for whole, seen in run_ranks(2, shapes_in_fit, job):
        assert {(8, 3, 6), (8, 2, 6)} & seen  # its rows of them
        assert not whole & seen
    for whole, seen in run_ranks(2, shapes_in_fit, dataclasses.replace(job, module=Net)):
        assert whole <= seen


class Saves(Meta):
    def on_train_end(self):
        self.trainer.save_checkpoint(self.job.path)


def test_nor_when_it_goes_on_from_a_sharded_checkpoint(tmp_path):
    job = dataclasses.replace(JOB, num_experts=8, slots=4, strategy={"checkpoint": "sharded"})
    saving = dataclasses.replace(job, module=Saves)
    saving.path = tmp_path / "saved"
    run_ranks(2, shapes_in_fit, saving)
    for whole, seen in run_ranks(2, shapes_in_fit, dataclasses.replace(job, steps=5), tmp_path / "saved"):
        assert {(8, 3, 6), (8, 2, 6)} & seen
        assert not whole & seen
