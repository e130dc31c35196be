"""Gradients that a user throws away are gone, and steps without gradients change nothing."""

import pytest

from tests.jobs import Job, Net, sgd
from tests.semantics.systems import check

pytestmark = pytest.mark.distributed


class Skips(Net):
    """Throws the gradients of every other batch away."""

    automatic_optimization = False

    def throw_away(self, optimizer):
        optimizer.zero_grad()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2 == 0:
            self.throw_away(optimizer)
            return
        optimizer.step()
        optimizer.zero_grad()


class SkipsNot(Skips):
    def throw_away(self, optimizer):
        pass


class SkipsByModule(Skips):
    def throw_away(self, optimizer):
        self.zero_grad()


class SkipsToZeros(Skips):
    """Zeros are gradients: momentum and weight decay go on."""

    def throw_away(self, optimizer):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()


class SkipsByHand(Skips):
    def throw_away(self, optimizer):
        for p in self.parameters():
            p.grad = None


class SkipsExpertsOnly(Skips):
    """The rest accumulates."""

    def throw_away(self, optimizer):
        for moe in self.moes:
            moe.experts.zero_grad()


@pytest.mark.parametrize("module", [Skips, SkipsByModule, SkipsToZeros, SkipsByHand, SkipsExpertsOnly])
def test_in_manual_optimization(system, module):
    check(system, Job(steps=6, optimizer=sgd, module=module, trainer={"max_steps": 3}), without=SkipsNot)


def test_in_manual_optimization_with_moments(system):
    check(system, Job(steps=6, module=SkipsToZeros, trainer={"max_steps": 3}), without=SkipsNot)


class ZeroesAfterBackward(Net):
    """Drops the first micro-batch of the second step."""

    def on_after_backward(self):
        if self.trainer.fit_loop.batch_idx == 2:
            self.zero_grad()


class ZeroesBeforeStep(Net):
    """The second step has no gradients at all."""

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 1:
            self.zero_grad()


class ZeroesInPlace(Net):
    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 1:
            for p in self.parameters():
                p.grad.zero_()


class ZeroesTwice(Net):
    """Harmless in one process: nothing is left by then."""

    def on_before_zero_grad(self, optimizer):
        self.zero_grad()

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.fit_loop.batch_idx % 2 == 0:
            self.zero_grad()


class LeavesOut(Net):
    """Only the second layer's experts have no gradient on the second step."""

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 1:
            self.moes[1].experts.zero_grad()


class KeepsGradients(Net):
    """Never zeroed: gradients of all steps add up."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


@pytest.mark.parametrize("module", [ZeroesAfterBackward, ZeroesBeforeStep, ZeroesInPlace, LeavesOut, KeepsGradients])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_hook(system, module, accumulate):
    job = Job(steps=3, module=module, trainer={"accumulate_grad_batches": accumulate})
    check(system, job, without=Net)


def test_zeroing_twice_is_harmless(system):
    check(system, Job(steps=3, module=ZeroesTwice, trainer={"accumulate_grad_batches": 2}))


class ClipsOrSkips(Skips):
    """The step is skipped by the size of its gradients, as GradScaler-like code does."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) * (1e4 if batch_idx == 1 else 1))
        self.clip_gradients(optimizer, gradient_clip_val=1e3, gradient_clip_algorithm="norm")
        large = sum(p.grad.square().sum() for p in self.parameters()) > 1e4
        self.seen.append(bool(large))
        if large:
            return
        optimizer.step()


def test_skipped_by_the_size_of_the_gradients(system):
    seen = check(system, Job(steps=4, module=ClipsOrSkips, trainer={"max_steps": 3}))["seen"]
    assert seen == [False, True, False, False]
