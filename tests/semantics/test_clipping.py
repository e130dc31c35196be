"""Clipping, by the user's own hand or Lightning's, sees the gradients of all experts."""

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from tests.jobs import Job, Net, adamw, sgd, train
from tests.ranks import run_ranks
from tests.semantics.systems import OURS, check, on

pytestmark = pytest.mark.distributed

# Small experts' gradients beside a large threshold would never be clipped.
MAX_NORM = 0.05


class ClipsItself(Net):
    """The hook that Lightning documents for it."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.seen.append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)))


class ClipsGroups(Net):
    """As many training scripts do: experts and the rest apart, each with its own norm."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        experts = [p for name, p in self.named_parameters() if "experts" in name]
        rest = [p for name, p in self.named_parameters() if "experts" not in name]
        for part, max_norm in ((experts, MAX_NORM / 4), (rest, MAX_NORM)):
            self.seen.append(float(torch.nn.utils.clip_grad_norm_(part, max_norm)))


class ClipsValues(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_value_(self.parameters(), 0.01)


class ClipsMaxima(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.seen.append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.02, norm_type=float("inf"))))


class ClipsOptimizer(Net):
    """Through the groups of the optimizer instead of the module."""

    def on_before_optimizer_step(self, optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.seen.append(float(torch.nn.utils.clip_grad_norm_(params, MAX_NORM)))


@pytest.mark.parametrize("module", [ClipsItself, ClipsGroups, ClipsValues, ClipsMaxima, ClipsOptimizer])
def test_in_a_hook(system, module):
    expected = check(system, Job(steps=4, optimizer=sgd, module=module), without=Net)
    assert all(norm > MAX_NORM / 2 for norm in expected["seen"])


def test_with_accumulation(system):
    job = Job(steps=3, optimizer=adamw, module=ClipsItself, trainer={"accumulate_grad_batches": 2})
    expected = check(system, job)
    assert len(expected["seen"]) == 3


class Manual(Net):
    automatic_optimization = False

    def clip(self, optimizer):
        self.seen.append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(self.loss(batch))
        self.clip(optimizer)
        optimizer.step()


class ManualUnclipped(Manual):
    def clip(self, optimizer):
        pass


class ManualNorm(Manual):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")


class ManualValue(Manual):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


class ManualMicroBatches(Manual):
    """Accumulates by hand over two batches, then clips."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.clip(optimizer)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("module", [Manual, ManualNorm, ManualValue, ManualMicroBatches])
def test_in_manual_optimization(system, module):
    check(system, Job(steps=4, optimizer=sgd, module=module), without=ManualUnclipped)


VARIANTS = {
    "norm": {"gradient_clip_val": MAX_NORM},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_by_the_trainer_under_an_accumulation_schedule(system, variant):
    job = Job(
        steps=6,
        optimizer=sgd,
        trainer={"max_steps": 9, **VARIANTS[variant]},
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
    )
    check(system, job)


@on(OURS)
def test_frozen_matrix_is_left_out_of_the_norm(system):
    def frozen_down(module):
        for moe in module.moes:
            moe.experts.down_proj.requires_grad_(False)
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)

    check(system, Job(steps=3, optimizer=frozen_down, module=ClipsItself))


def fit_twice():
    job = Job(slots=3, trainer={"gradient_clip_val": 0.05})
    return [train(job) for _ in range(2)]


def test_clipping_in_two_fits_of_one_process():
    """Each fit has process groups of its own; torch remembers meshes."""
    for first, again in run_ranks(2, fit_twice):
        assert all(torch.equal(first[key], again[key]) for key in first)
