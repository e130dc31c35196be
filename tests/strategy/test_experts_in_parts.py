"""After the fit of a module that was built on the meta device: nobody mistakes what has no weights for weights."""

import copy
import dataclasses
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_swiftmoe import WeightEMA
from lightning_swiftmoe.parallel.meta_start import has_meta, materialize_dense
from tests.jobs import Batches, Net, data, largest_error, our_trainer
from tests.ranks import run_ranks
from tests.strategy.test_meta_start import JOB, Meta

pytestmark = pytest.mark.distributed


def trained(job, callbacks=()):
    job = dataclasses.replace(job, callbacks=lambda: list(callbacks))
    trainer, module = our_trainer(job), job.module(job)
    batches = data(job, dist.get_rank(), dist.get_world_size())
    trainer.fit(module, batches)
    return trainer, module, batches


def validated(module, batches, job=JOB):
    ((metrics),) = our_trainer(job).validate(module, batches, verbose=False)
    return metrics["val"]


def copies():
    ema = WeightEMA(decay=0.5)
    _, module, batches = trained(JOB, [ema])
    averaged, alike = copy.deepcopy(module), copy.deepcopy(module)
    ema.apply_to(averaged)
    of_copy, of_module = validated(alike, batches), validated(module, batches)
    averages = ema.state_dict()["averages"]
    error = max(float((value - averages[name]).abs().max()) for name, value in averaged.named_parameters())
    return of_copy, of_module, error, float((averages["out.weight"] - module.out.weight).abs().max())


def test_copies_have_what_was_trained():
    for of_copy, of_module, error, difference in run_ranks(2, copies):
        assert of_copy == of_module
        assert error == 0
        assert difference > 1e-5


def errors_of_state_dicts():
    trainer, module, _ = trained(JOB)
    found = []
    zeros = {name: torch.zeros(param.shape) for name, param in module.named_parameters()}
    for work in (module.state_dict, lambda: module.load_state_dict(zeros, strict=False), lambda: pickle.dumps(module)):
        with pytest.raises(RuntimeError) as caught:
            work()
        found.append(str(caught.value))
    trainer.strategy.gather_experts()
    assert not has_meta(module)
    return found, module.state_dict()


def test_state_dicts_and_pickles_are_refused_until_experts_are_whole(tmp_path):
    results = run_ranks(2, errors_of_state_dicts)
    for found, state in results:
        assert len(found) == 3
        assert all("Call trainer.strategy.gather_experts() on all ranks" in text for text in found)
        assert largest_error(floats(state), floats(results[0][1])) == 0


def floats(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


def saved_by_the_first_trainer(path):
    first, module, batches = trained(JOB)
    our_trainer(JOB).fit(module, batches)
    first.save_checkpoint(path)
    first.strategy.gather_experts()
    return module.state_dict()


def test_a_checkpoint_of_an_earlier_trainer_has_the_weights_of_now(tmp_path):
    state, _ = run_ranks(2, saved_by_the_first_trainer, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=False)["state_dict"]
    assert largest_error(floats(saved), floats(state)) == 0


class Fails(Meta):
    fails = False

    def configure_optimizers(self):
        if self.fails:
            raise ValueError("not this time")
        return super().configure_optimizers()


def fails_and_goes_on(path):
    trainer, module, batches = trained(dataclasses.replace(JOB, module=Fails))
    trainer.save_checkpoint(path)
    before = validated(copy.deepcopy(module), batches)
    module.fails = True
    with pytest.raises(ValueError, match="not this time"):
        our_trainer(JOB).fit(module, batches)
    return before, validated(module, batches)


def test_a_fit_that_fails_early_loses_nothing(tmp_path):
    for before, after in run_ranks(2, fails_and_goes_on, tmp_path / "saved"):
        assert before == after


def other_groups():
    _, module, batches = trained(JOB)
    whole = dataclasses.replace(JOB, slots=5, strategy={"expert_parallel_size": 1})
    with pytest.raises(ValueError, match=r"was trained in expert groups of 2 ranks, and is in parts: call strategy"):
        our_trainer(whole).fit(module, batches)
    trainer = our_trainer(whole)
    before = validated(copy.deepcopy(module), batches)
    assert validated(module, batches, whole) == before
    trainer.fit(module, batches)
    return before


def test_other_expert_groups_gather_first():
    assert all(run_ranks(2, other_groups))


class Held(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.register_buffer("held", buffer)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 40), nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight


class HalfThere(nn.Module):
    def __init__(self):
        super().__init__()
        self.there = nn.Linear(2, 2)
        with torch.device("meta"):
            self.lacking = nn.Linear(2, 2)

    def initialize_weights(self):
        for param in self.parameters():
            nn.init.ones_(param)


def test_what_modules_hold_is_not_made_up():
    with torch.device("meta"):
        held = [Held(torch.ones(4).bool()), Held(torch.arange(4)), Held(torch.ones(2))]
        tied = Tied()
    for module in held:
        with pytest.raises(ValueError, match=r"held was built on the meta device and nobody initialises it"):
            materialize_dense(module, 0)
    materialize_dense(tied, 0)
    assert tied.head.weight is tied.embed.weight
    assert float(tied.head.weight.std()) == pytest.approx(1, rel=0.1)
    half = HalfThere()
    before = half.there.weight.clone()
    materialize_dense(half, 0)
    assert torch.equal(half.there.weight, before)
    assert (half.lacking.weight == 1).all()


class Forked(Meta):
    pass


def test_a_process_that_waits_for_its_ranks_gets_whole_experts():
    job = dataclasses.replace(JOB, trainer={"devices": 2}, precision="32-true")
    results = {}
    for cls in (Net, Forked):
        torch.manual_seed(7)
        module = cls(job)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(strategy="swiftmoe_fork", accelerator="cpu", devices=2, max_steps=2, **options)
        source = data(job)
        trainer.fit(module, Batches(source.x, source.y))
        assert not has_meta(module)
        results[cls] = module.state_dict()
    assert all(not value.isnan().any() for value in results[Forked].values())
    assert all(float(param.abs().max()) > 0 for param in module.moes[0].experts.parameters())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_narrow_weights_start_alike_on_any_number_of_ranks(num_ranks, tmp_path):
    job = dataclasses.replace(JOB, precision="bf16-true", slots=6 // num_ranks)
    run_ranks(num_ranks, first_weights, job, tmp_path / "start")
    saved = torch.load(tmp_path / "start", weights_only=False)["state_dict"]
    for name, value in saved.items():
        if "experts." in name:
            assert torch.equal(value, value.bfloat16().to(value.dtype)), name


def first_weights(job, path):
    class Save(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(path)

    trained(job, [Save()])
