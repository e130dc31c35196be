"""Schedule-free optimizers (arXiv 2405.15682): ``eval()`` and ``train()`` change all weights between two steps."""

import dataclasses

import pytest
import torch

from tests.jobs import Job, Net, largest_error, train, train_alone, two_groups
from tests.ranks import run_ranks
from tests.semantics.systems import OURS, SHARDED, check, on

pytestmark = pytest.mark.distributed

VALIDATED = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
EXACT = 1e-12


class ScheduleFree(torch.optim.Optimizer):
    """Parameters are ``y`` in train mode and the average ``x`` in eval mode; ``state["z"]`` is what SGD moves.

    ``warmup`` and ``report`` are no options of a group: nobody can make another one from its defaults.
    """

    def __init__(self, params, warmup, lr, beta=0.9, weight_decay=0.0, *, report=print):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "k": 0, "training": False})
        self.warmup = warmup
        self.report = report

    def train(self):
        self.switch(True, lambda beta: 1 - beta)

    def eval(self):
        self.switch(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def switch(self, training, weight):
        for group in self.param_groups:
            for p in group["params"]:
                if group["training"] != training and "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight(group["beta"]))
            group["training"] = training

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            assert group["training"], "call train() first"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group, group["lr"] * min(1, group["k"] / self.warmup))
        return loss

    def update(self, p, state, group, lr):
        z = state.setdefault("z", p.clone())
        grad = self.direction(p.grad, state, group) + group["weight_decay"] * p
        p.lerp_(z, 1 / group["k"])
        p.add_(grad, alpha=lr * (group["beta"] * (1 - 1 / group["k"]) - 1))
        z.sub_(grad, alpha=lr)

    def direction(self, grad, state, group):
        return grad


class ScheduleFreeAdamW(ScheduleFree):
    def direction(self, grad, state, group):
        second = state.setdefault("exp_avg_sq", torch.zeros_like(grad))
        second.lerp_(grad.square(), 0.05)
        return grad / ((second / (1 - 0.95 ** group["k"])).sqrt() + 1e-8)


def free_sgd(module):
    return two_groups(module, ScheduleFree, lr=0.3, warmup=3)


def free_adamw(module):
    return two_groups(module, ScheduleFreeAdamW, lr=0.05, warmup=3, weight_decay=0.1)


class Switches(Net):
    """By Lightning's hooks around validation and training."""

    def on_train_start(self):
        self.optimizers().train()

    def on_validation_start(self):
        self.optimizers().eval()

    def on_validation_end(self):
        self.optimizers().train()

    def on_train_end(self):
        self.optimizers().eval()

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.loss(batch).item())


class SwitchesWithModel(Switches):
    """Together with the module's own modes."""

    def on_validation_start(self):
        pass

    def on_validation_end(self):
        pass

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.optimizers().eval()

    def on_validation_model_train(self):
        super().on_validation_model_train()
        self.optimizers().train()


class NeverSwitches(Switches):
    """Validates what training uses."""

    def on_validation_start(self):
        pass


def job_of(optimizer, module=Switches):
    return Job(steps=6, optimizer=optimizer, module=module, trainer=VALIDATED)


@pytest.mark.parametrize("module", [Switches, SwitchesWithModel])
@pytest.mark.parametrize("optimizer", [free_sgd, free_adamw])
@on(OURS)
def test_equals_one_process(system, optimizer, module):
    expected = check(system, job_of(optimizer, module), EXACT)
    assert len(expected["seen"]) == 3


@on(SHARDED)
def test_validation_sees_averages(system):
    """And not the weights of training, which give another loss."""
    averages = check(system, job_of(free_sgd), EXACT)["seen"]
    others = check(system, job_of(free_sgd, NeverSwitches), EXACT)["seen"]
    assert all(abs(a - b) > 1e-4 for a, b in zip(averages[1:], others[1:], strict=True))


@on(SHARDED)
def test_state_moves_with_the_experts(system):
    check(system, dataclasses.replace(job_of(free_adamw), strategy={"optimizer_state": "bound"}), EXACT)


def resume(job, path):
    return train(job, ckpt_path=path)


def test_resumes_on_another_number_of_ranks(tmp_path):
    whole = dataclasses.replace(job_of(free_adamw), slots=3)
    half = dataclasses.replace(whole, trainer={"max_steps": 3})
    path = str(tmp_path / "half.ckpt")
    run_ranks(2, train, half, None, path)
    expected = train_alone(whole)
    assert largest_error(run_ranks(3, resume, whole, path)[0], expected) < EXACT
    assert largest_error(train_alone(whole, path), expected) < EXACT
