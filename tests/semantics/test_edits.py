"""Expert weights that are changed between two steps are what the next step computes with."""

import copy

import pytest
import torch

from tests.jobs import Job, Net, full, sgd
from tests.semantics.systems import check

pytestmark = pytest.mark.distributed

VALIDATED = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}


def experts(module):
    return [p for moe in module.moes for p in moe.experts.parameters()]


def drawn(shape):
    """The same new weights on every rank."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64) - 0.5


def clamp(module):
    with torch.no_grad():
        for p in experts(module):
            p.clamp_(-0.1, 0.1)


def copy_whole(module):
    with torch.no_grad():
        for p in experts(module):
            p.copy_(drawn(p.shape))


def scale_data(module):
    for p in experts(module):
        p.data.mul_(0.5)


def replace_data(module):
    for p in experts(module):
        p.data = p.data * 0.5


def one_expert(module):
    with torch.no_grad():
        for moe in module.moes:
            moe.experts.down_proj[3].mul_(-2)


def norm_ball(module):
    """Rows of every expert back to a norm: reads along the cut, then writes."""
    with torch.no_grad():
        for moe in module.moes:
            w = moe.experts.down_proj
            w.mul_((0.2 / w.norm(dim=(1, 2), keepdim=True)).clamp(max=1))


def load(module):
    """Whole canonical weights, as from a file."""
    state = {name: drawn(p.shape) for name, p in module.named_parameters()}
    module.load_state_dict(state, strict=False)


def load_experts(module):
    """Into a submodule."""
    for moe in module.moes:
        moe.experts.load_state_dict({name: drawn(p.shape) for name, p in moe.experts.named_parameters()})


def load_assign(module):
    """What was saved from this very module."""
    state = {name: full(value) * 0.5 for name, value in module.state_dict().items()}
    module.load_state_dict(state)


def reset(module):
    """Every rank draws from the same seed, as DDP needs too."""
    torch.manual_seed(5)
    for moe in module.moes:
        moe.experts.reset_parameters()


EDITS = [clamp, copy_whole, scale_data, replace_data, one_expert, norm_ball, load, load_experts, load_assign, reset]


class Edits(Net):
    """Changes the experts once, between the second and the third step."""

    edit = staticmethod(lambda module: None)

    def forward(self, x):
        y = super().forward(x)
        if not self.training:
            self.seen.append(y.detach().square().mean().item())
        return y


class AtEnd(Edits):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 2:
            self.edit(self)


class AtStart(Edits):
    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            self.edit(self)


class AfterValidation(Edits):
    def on_validation_end(self):
        if self.trainer.global_step == 2:
            self.edit(self)


class BeforeValidation(Edits):
    """Validation sees them too."""

    def on_validation_start(self):
        if self.trainer.global_step == 2:
            self.edit(self)


def job_of(when, edit, **kwargs):
    module = type(when.__name__, (when,), {"edit": staticmethod(edit)})
    return Job(steps=4, optimizer=sgd, module=module, **kwargs)


@pytest.mark.parametrize("edit", EDITS)
def test_at_the_end_of_a_batch(system, edit):
    check(system, job_of(AtEnd, edit), without=Net)


@pytest.mark.parametrize("edit", [scale_data, load])
@pytest.mark.parametrize("when", [AtStart, AfterValidation, BeforeValidation])
def test_at_other_times(system, when, edit):
    expected = check(system, job_of(when, edit, trainer=VALIDATED), without=Net)
    assert len(expected["seen"]) == 4


class AtEveryEnd(Edits):
    """WGAN's weight clipping, under the optimizer's momentum and weight decay."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        clamp(self)


def test_on_every_step(system):
    check(system, Job(steps=4, module=AtEveryEnd), without=Net)


class InsideTrainingStep(Net):
    """Before the forward of the same step."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            copy_whole(self)
        return super().training_step(batch, batch_idx)


def test_at_the_head_of_training_step(system):
    check(system, Job(steps=4, optimizer=sgd, module=InsideTrainingStep), without=Net)


class ThroughDataKeptBefore(Net):
    """``.data`` of long ago still is the weights."""

    def on_train_start(self):
        self.kept = [p.data for p in experts(self)]

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            for data in self.kept:
                data.mul_(0.5)
        return super().training_step(batch, batch_idx)


class ReplacesDataInside(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            replace_data(self)
        return super().training_step(batch, batch_idx)


class BetweenForwards(Net):
    """The second forward of a step sees what changed since the first."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.loss(batch)
            for p in experts(self):
                p.mul_(0.9)
        return super().training_step(batch, batch_idx)


class WritesByIndex(Net):
    """Along the rows, which are cut: by numbers, slices and masks."""

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for w in experts(self):
            w[:, -1] = 0.1
            w[2, 0, 1:] *= 2
            w[w > 0.3] = 0.3


@pytest.mark.parametrize("module", [ThroughDataKeptBefore, ReplacesDataInside, BetweenForwards, WritesByIndex])
def test_other_ways(system, module):
    check(system, Job(steps=4, optimizer=sgd, module=module), without=Net)


class InsideOptimizerStep(Net):
    """A projection after the update, as proximal methods have it."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        clamp(self)


def test_after_the_optimizer_in_optimizer_step(system):
    check(system, Job(steps=4, optimizer=sgd, module=InsideOptimizerStep), without=Net)


class SwapsAverages(Edits):
    """An average of the weights is validated; training goes on with the weights themselves."""

    def on_train_start(self):
        self.average = {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for name, p in self.named_parameters():
            self.average[name].mul_(0.9).add_(p.detach(), alpha=0.1)

    def on_validation_start(self):
        self.kept = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.write(self.average)

    def on_validation_end(self):
        self.write(self.kept)

    def write(self, values):
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(values[name])


def test_averages_swapped_in_for_validation(system):
    expected = check(system, Job(steps=4, module=SwapsAverages, trainer=VALIDATED))
    plain = check(system, Job(steps=4, module=Edits, trainer=VALIDATED))
    assert abs(expected["seen"][2] - plain["seen"][2]) > 1e-4 * plain["seen"][2]


class Rewinds(Net):
    """Back to the weights of an earlier step, kept as a deep copy of the state dict."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 1:
            self.snapshot = copy.deepcopy(self.state_dict())
        if self.trainer.global_step == 3:
            self.load_state_dict(self.snapshot)


def test_state_dict_goes_back_in(system):
    check(system, Job(steps=5, optimizer=sgd, module=Rewinds), without=Net)


class EditsMoments(Net):
    """Optimizer state is there to be edited as well."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 2:
            optimizer = self.optimizers(use_pl_optimizer=False)
            for p in self.parameters():
                optimizer.state[p]["momentum_buffer"].mul_(0.25)


class DropsMoments(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 2:
            self.optimizers(use_pl_optimizer=False).state.clear()


@pytest.mark.parametrize("module", [EditsMoments, DropsMoments])
def test_optimizer_state(system, module):
    check(system, Job(steps=4, optimizer=sgd, module=module), without=Net)
