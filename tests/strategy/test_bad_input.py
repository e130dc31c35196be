"""A mistake gives one clear error, and no rank is left waiting."""

import sys

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from lightning_swiftmoe import ExpertRebalancer, MoE, SwiftMoEStrategy
from lightning_swiftmoe._compat import refuse_other_namespace
from tests.jobs import Job, Net, data, largest_error, make_trainer, our_trainer, sgd
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 5}, "top_k must be 1 .. num_experts = 4, got 5"),
        ({"top_k": 0}, "top_k must be"),
        ({"activation": "tanh"}, "activation must be one of .*gelu.*, got 'tanh'"),
        ({"capacity_factor": 0.0}, "capacity_factor must be None or above zero, got 0.0"),
        ({"score": "max"}, "score must be softmax or sigmoid, got 'max'"),
        ({"aux_loss_coef": -1}, "aux_loss_coef must be zero or more, got -1"),
    ],
)
def test_layer_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoE(8, 16, 4, **kwargs)


def test_layer_input_of_another_width():
    with pytest.raises(ValueError, match="the last dim of x must be hidden_size = 8, got 9"):
        MoE(8, 16, 4)(torch.randn(2, 9))


@pytest.mark.parametrize("slots", [0, -1, 1.5, "many", True])
def test_slots_argument(slots):
    with pytest.raises(ValueError, match='slots_per_rank must be "auto" or a positive integer'):
        SwiftMoEStrategy(slots_per_rank=slots)


def test_names_of_arguments_also_where_ddp_would_not_look_at_them():
    with pytest.raises(TypeError, match="unexpected keyword argument 'slot_per_rank'; did you mean 'slots_per_rank'"):
        SwiftMoEStrategy(slot_per_rank=4)
    SwiftMoEStrategy(find_unused_parameters=True, start_method="fork")


def test_callback_arguments():
    with pytest.raises(ValueError, match="unknown placement policy 'hottest'; there are auto"):
        ExpertRebalancer(policy="hottest")
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        ExpertRebalancer(every_n_steps=0)


def fit_alone(job, *, callbacks=(), module=None, **kwargs):
    trainer = make_trainer(job, SwiftMoEStrategy(slots_per_rank=job.slots), callbacks=list(callbacks), **kwargs)
    trainer.fit(module or Net(job), data(job))


def assert_no_process_group(*_):
    assert not dist.is_initialized()


def test_too_few_slots_before_any_process_group():
    with pytest.raises(ValueError, match=r"layer 'moes\.0': 1 ranks x 2 slots .* slots_per_rank that works is 5"):
        fit_alone(Job(slots=2))
    assert_no_process_group()


def test_unsupported_precision():
    with pytest.raises(ValueError, match="precision '16-true' is not supported; choose one of 32-true"):
        fit_alone(Job(slots=5, precision="16-true"))
    assert_no_process_group()


@pytest.mark.parametrize("callback", [lambda: EMAWeightAveraging(), lambda: StochasticWeightAveraging(0.1)])
def test_stock_weight_averaging(callback):
    with pytest.raises(ValueError, match="averages parameters by position"):
        fit_alone(Job(slots=5), callbacks=[callback()])
    assert_no_process_group()


def fit_on_ranks(job):
    our_trainer(job).fit(Net(job), data(job, dist.get_rank(), dist.get_world_size()))


def test_trainable_expert_in_no_optimizer():
    def forgetful(module):
        return torch.optim.SGD([p for n, p in module.named_parameters() if "moes.1.experts.up" not in n], lr=0.1)

    message = r"moes\.1\.experts\.up_proj is trainable but in no optimizer"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, fit_on_ranks, Job(slots=3, optimizer=forgetful))


def test_frozen_experts_are_legal_and_stay():
    before, after = run_ranks(2, fit_frozen)[0]
    assert torch.equal(before, after)


def fit_frozen():
    job = Job(slots=3, optimizer=lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
    module = Net(job)
    module.moes[0].experts.up_proj.requires_grad_(False)
    before = module.moes[0].experts.up_proj.detach().clone().double()
    our_trainer(job).fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return before, module.moes[0].experts.up_proj.detach()


def test_other_lightning_namespace_is_named():
    import pytorch_lightning

    assert "pytorch_lightning.strategies" in sys.modules
    refuse_other_namespace(["swiftmoe"])
    with pytest.raises(ImportError, match=r"supports lightning\.pytorch only"):
        pytorch_lightning.Trainer(strategy="swiftmoe", accelerator="cpu", logger=False)


def fit_with_empty_batch():
    job = Job(slots=3, optimizer=sgd)
    rank = dist.get_rank()
    batches = data(job, 0, 1)
    keep = 0 if rank == 1 else job.batch
    batches.x, batches.y = batches.x[:, :keep], batches.y[:, :keep]
    module = Net(job)
    our_trainer(job).fit(module, batches)
    return module.state_dict()


class Halved(Net):
    """What a mean over two ranks makes of a loss that one of them has no tokens for."""

    def loss(self, batch):
        return super().loss(batch) / 2


def test_an_empty_batch_takes_part_with_zero_tokens():
    job = Job(slots=3, optimizer=sgd)
    expected = Halved(job).double()
    make_trainer(job).fit(expected, data(job))
    for result in run_ranks(2, fit_with_empty_batch):
        assert largest_error(result, expected.state_dict()) < 1e-9


class Poisoned(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 else loss


def fit_poisoned():
    job = Job(slots=3, optimizer=sgd, policy="proportional")
    trainer = our_trainer(job)
    trainer.fit(Poisoned(job), data(job, dist.get_rank(), dist.get_world_size()))
    rebalancer = next(c for c in trainer.callbacks if isinstance(c, ExpertRebalancer))
    return list(rebalancer.state.placements.values())


def test_nan_losses_leave_a_valid_placement():
    first, second = run_ranks(2, fit_poisoned)
    assert first == second
    assert all({e for row in table for e in row} == set(range(5)) for table in first)
