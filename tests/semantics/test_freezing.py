"""Parameters that train later, now and then, or never."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning

from lightning_swiftmoe.trace_file import read_trace
from tests.jobs import Job, Net, full, sgd
from tests.semantics.systems import OURS, check, on

pytestmark = pytest.mark.distributed


class UnfreezesExperts(BaseFinetuning):
    """From the second epoch on experts train, one layer after the other, in groups of their own."""

    def freeze_before_training(self, pl_module):
        self.freeze([moe.experts for moe in pl_module.moes])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch in (1, 2):
            self.unfreeze_and_add_param_group(pl_module.moes[epoch - 1].experts, optimizer, lr=0.05)


def trainable(module):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)


@on(OURS)  # DDP looks for what trains once, when it is made
def test_unfreeze_and_add_param_group(system):
    unfrozen = Job(steps=2, optimizer=trainable, trainer={"max_steps": 6}, callbacks=lambda: [UnfreezesExperts()])
    weights = check(system, unfrozen)["weights"]
    first = Net(unfrozen).double().state_dict()
    assert all((weights[k] - first[k]).norm() > 0.01 for k in weights)


class AddsGroup(Net):
    """By hand, on a step in the middle of an epoch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 2:
            params = [p for moe in self.moes for p in moe.experts.parameters()]
            for p in params:
                p.requires_grad_(True)
            self.optimizers(use_pl_optimizer=False).add_param_group({"params": params, "lr": 0.02})


def experts_frozen(module):
    for moe in module.moes:
        moe.experts.requires_grad_(False)
    return trainable(module)


@on(OURS)
def test_add_param_group_between_steps(system):
    check(system, Job(steps=5, optimizer=experts_frozen, module=AddsGroup), without=Net)


class Toggles(Net):
    """Experts train on odd batches, everything else on even ones."""

    def on_train_batch_start(self, batch, batch_idx):
        for name, p in self.named_parameters():
            p.requires_grad_(("experts" in name) == bool(batch_idx % 2))


class TogglesOneMatrix(Net):
    def on_train_batch_start(self, batch, batch_idx):
        self.moes[0].experts.down_proj.requires_grad_(batch_idx % 2 == 0)


class TogglesInTrainingStep(Net):
    def training_step(self, batch, batch_idx):
        self.moes[1].experts.requires_grad_(batch_idx % 2 == 0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("module", [Toggles, TogglesOneMatrix, TogglesInTrainingStep])
def test_toggled_between_steps(system, module):
    check(system, Job(steps=5, optimizer=sgd, module=module), without=Net)


class Adversaries(Net):
    """Two optimizers take turns; each one's parameters alone are trainable in its turn."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        experts = [p for name, p in self.named_parameters() if "experts" in name]
        rest = [p for name, p in self.named_parameters() if "experts" not in name]
        return [torch.optim.Adam(experts, lr=0.02), torch.optim.SGD(rest, lr=0.1)]


def test_toggle_optimizer(system):
    check(system, Job(steps=6, module=Adversaries))


def one_matrix_frozen(module):
    module.moes[0].experts.up_proj.requires_grad_(False)
    return trainable(module)


def only_one_matrix(module):
    module.requires_grad_(False)
    module.moes[1].experts.down_proj.requires_grad_(True)
    return trainable(module)


def experts_only(module):
    for name, p in module.named_parameters():
        p.requires_grad_("experts" in name)
    return trainable(module)


FROZEN = {
    "one_matrix": (one_matrix_frozen, "moes.0.experts.up_proj"),
    "experts": (experts_frozen, "moes.1.experts.down_proj"),
    "dense": (experts_only, "inp.weight"),
    "all_but_one_matrix": (only_one_matrix, "moes.1.experts.up_proj"),
}


@pytest.mark.parametrize("what", FROZEN)
def test_frozen_in_configure_optimizers(system, what):
    optimizer, name = FROZEN[what]
    weights = check(system, Job(steps=4, optimizer=optimizer))["weights"]
    assert torch.equal(weights[name], Net(Job()).double().state_dict()[name])


class DenseFrozen(Net):
    """Frozen before ``fit``, as most users do."""

    def __init__(self, job):
        super().__init__(job)
        for name, p in self.named_parameters():
            p.requires_grad_("experts" in name)


class ExpertsFrozen(Net):
    def __init__(self, job):
        super().__init__(job)
        for moe in self.moes:
            moe.experts.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        # Here a step's end has moved the bias in every system: alone it happens in the forward before this line.
        self.seen.append([moe.router.expert_bias.double().clone() for moe in self.moes])
        return loss


def test_dense_frozen_before_fit(system):
    check(system, Job(steps=4, optimizer=trainable, module=DenseFrozen))


BIASED = {"bias_update_rate": 0.01, "score": "sigmoid"}


@on(OURS)
def test_steps_end_where_all_experts_are_frozen(system, tmp_path):
    path = tmp_path / "trace.npy.gz"
    job = Job(
        steps=5,
        optimizer=trainable,
        module=ExpertsFrozen,
        moe=BIASED,
        policy="proportional",
        rebalancer={"trace": path},
    )
    biases = check(system, job)["seen"]
    assert biases[-1][0].abs().max() > 0.015
    trace = read_trace(path)
    assert trace["counts"].shape == (5, 2, system.num_ranks, 5)
    assert (trace["counts"].sum(axis=(2, 3)) == 24 * 2).all()
    assert json.loads(str(trace["meta"]))["layers"] == ["moes.0", "moes.1"]
    # "proportional" follows loads that are far from even: the placement must leave the uniform one.
    assert system.num_ranks == 1 or (trace["replicas"][1:] != trace["replicas"][0]).any()


class Unfreezes(ExpertsFrozen):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append({name: full(p).clone() for name, p in self.named_parameters() if "experts" in name})


@on(OURS)
def test_frozen_experts_stay_whole(system):
    seen = check(system, Job(steps=3, optimizer=trainable, module=Unfreezes, moe=BIASED))["seen"]
    first = Unfreezes(Job(moe=BIASED)).double()
    for name, value in seen[-1].items():
        assert torch.equal(value, first.get_parameter(name))
