"""Which optimizers may train experts: who is not known is tried, and left as it was."""

import dataclasses
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.optim.elementwise import check_elementwise
from tests.jobs import Job, Net, data, our_trainer
from tests.ranks import run_ranks
from tests.semantics.systems import SHARDED, check, on


class Lion(torch.optim.Optimizer):
    """Element-wise, but unknown to torch."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["beta"])
                    self.update(p, momentum, group)
        return loss

    def update(self, p, momentum, group):
        p.sub_(momentum.sign() * group["lr"])


class NeedsMore(Lion):
    """Arguments that are no options of a group, one of them beyond copying."""

    def __init__(self, params, total_steps, *, scale):
        super().__init__(params)
        self.total_steps, self.scale, self.lock = total_steps, scale, threading.Lock()

    def update(self, p, momentum, group):
        with self.lock:
            p.sub_(momentum.sign() * group["lr"] * self.scale / self.total_steps)


class MovesLate(Lion):
    """Nothing happens in the first steps."""

    def update(self, p, momentum, group):
        self.state[p]["step"] = self.state[p].get("step", 0) + 1
        if self.state[p]["step"] > 6:
            super().update(p, momentum, group)


class MatricesDecay(Lion):
    """Element-wise whatever the shape, but biases are left out."""

    def update(self, p, momentum, group):
        super().update(p, momentum, group)
        if p.ndim > 1:
            p.mul_(0.99)


class RowNormed(Lion):
    """Not element-wise, and with a name that says nothing."""

    def update(self, p, momentum, group):
        p.sub_(group["lr"] * momentum / momentum.norm())


class GloballyNormed(Lion):
    """As by a limit of its own on the norm of all gradients: each rank would have another."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.sub_(1e-2 * p.grad / norm)


class MuonLike(Lion):
    """Orthogonalises the matrices of groups that ask for it."""

    def update(self, p, momentum, group):
        if not group.get("use_muon", True):
            super().update(p, momentum, group)
            return
        u, _, v = torch.linalg.svd(momentum, full_matrices=False)
        p.sub_(u @ v * group["lr"])


class Shampoo(Lion):
    """Its first steps are those of another optimizer."""


class LambdaLion(Lion):
    """Has the name of one that needs whole matrices in its own."""


class SharpnessAware(torch.optim.SGD):
    def step(self, closure):
        closure()
        closure()
        return super().step()


class LooksAhead(torch.optim.SGD):
    def step(self, closure):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1.01)
        closure()
        return super().step()


class Remembers(Lion):
    """Momentum under the Parameter, but not in ``state``."""

    def step(self, closure=None):
        self.momenta = getattr(self, "momenta", {})
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.momenta.setdefault(p, torch.zeros_like(p))
                self.update(p.data, momentum.lerp_(p.grad, 0.1), group)


class Fails(Lion):
    def update(self, p, momentum, group):
        raise RuntimeError("only on CUDA")


class Idle(Lion):
    def update(self, p, momentum, group):
        pass


def weight():
    return [nn.Parameter(torch.ones(2, 2))]


def at_rate_zero(cls):
    """Under a warm-up that starts at zero, and which wraps ``step``."""
    optimizer = cls(weight(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    return optimizer


def muon_for_dense():
    return MuonLike([{"params": weight(), "use_muon": False}])


PASS = {
    "AdamW": lambda: torch.optim.AdamW(weight()),
    "Adagrad": lambda: torch.optim.Adagrad(weight()),
    "Lion": lambda: Lion(weight(), lr=0.1),
    "arguments": lambda: NeedsMore(weight(), 10, scale=2.0),
    "late": lambda: MovesLate(weight()),
    "by shape": lambda: MatricesDecay(weight()),
    "rate zero": lambda: at_rate_zero(Lion),
    "name": lambda: LambdaLion(weight()),
    "muon elsewhere": muon_for_dense,
}


@pytest.mark.parametrize("name", PASS)
def test_elementwise_optimizers_pass(name):
    check_elementwise(PASS[name]())


REFUSED = [
    (lambda: MuonLike(weight()), "MuonLike cannot be sharded: it orthogonalises whole matrices"),
    (lambda: torch.optim.Muon(weight()), r"Muon cannot be sharded: .* return \[Muon\(dense\), AdamW\(experts\)\]"),
    (lambda: torch.optim.Adafactor(weight()), "Adafactor cannot be sharded: it factors second moments"),
    (lambda: torch.optim.LBFGS(weight()), "LBFGS cannot be sharded: it needs inner products"),
    (lambda: Shampoo(weight()), "Shampoo cannot be sharded: it preconditions"),
    (
        lambda: RowNormed(weight()),
        "RowNormed cannot be sharded: steps on a small expert and on its parts gave different",
    ),
    (
        lambda: GloballyNormed(weight()),
        "GloballyNormed cannot be sharded: its steps depend on all its parameters together",
    ),
    (lambda: at_rate_zero(RowNormed), "RowNormed cannot be sharded: steps on a small expert"),
    (lambda: SharpnessAware(weight(), lr=0.1), "it evaluates the loss several times a step"),
    (lambda: LooksAhead(weight(), lr=0.1), "it moves weights before it evaluates the loss"),
    (lambda: Remembers(weight()), "it remembers Parameters elsewhere than in param_groups and state"),
    (lambda: Fails(weight()), r"a trial of it .* failed \(RuntimeError: only on CUDA\).*trust_optimizer=True"),
    (lambda: Idle(weight()), r"a trial of it .* failed \(RuntimeError: 8 steps changed nothing\)"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_others_are_refused_with_the_reason(make, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        check_elementwise(make())
    assert "\n" not in str(caught.value)


def test_the_trial_leaves_everything_as_it_was():
    optimizer = at_rate_zero(NeedsMoreUnderSchedule)
    stepped = []
    optimizer.register_step_pre_hook(lambda *_: stepped.append(1))
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    optimizer.state[param]["momentum"] = torch.ones_like(param)
    check_elementwise(optimizer)
    assert torch.equal(param, torch.ones(2, 2))
    assert torch.equal(optimizer.state[param]["momentum"], torch.ones(2, 2))
    assert optimizer.param_groups[0]["lr"] == 0
    assert optimizer.history == []
    assert not stepped


class NeedsMoreUnderSchedule(NeedsMore):
    def __init__(self, params, lr):
        super().__init__(params, 10, scale=1.0)
        self.history = []

    def update(self, p, momentum, group):
        super().update(p, momentum, group)
        self.history.append(p)


def test_only_groups_with_experts_are_looked_at():
    dense, expert = weight(), weight()
    optimizer = MuonLike([{"params": dense}, {"params": expert, "use_muon": False}])
    check_elementwise(optimizer, set(expert))
    with pytest.raises(ValueError, match="orthogonalises"):
        check_elementwise(optimizer, set(dense))


class MatricesNormed(Lion):
    """Takes what has two dims for a matrix, which biases of experts [E, rows] are not."""

    def update(self, p, momentum, group):
        p.sub_(group["lr"] * (momentum / momentum.norm() if p.ndim == 2 else momentum))


def test_biases_of_experts_are_tried_too():
    matrices, biases = nn.Parameter(torch.ones(2, 2, 2)), nn.Parameter(torch.ones(2, 2))
    check_elementwise(MatricesNormed([matrices, biases]), {matrices})
    check_elementwise(MatricesDecay([matrices, biases]), {matrices, biases})
    with pytest.raises(ValueError, match="steps on a small expert and on its parts gave different weights"):
        check_elementwise(MatricesNormed([matrices, biases]), {matrices, biases})


def fit_on_ranks(job):
    our_trainer(job).fit(Net(job), data(job, dist.get_rank(), dist.get_world_size()))


def test_optimizer_is_checked_in_fit():
    job = Job(slots=3, optimizer=lambda module: RowNormed(module.parameters()))
    with pytest.raises(RuntimeError, match="RowNormed cannot be sharded"):
        run_ranks(2, fit_on_ranks, job)


def trusted(job):
    return dataclasses.replace(job, strategy={"trust_optimizer": True})


class FailsInTrials(Lion):
    """Element-wise, but particular about what it steps on: on three or more matrices."""

    def update(self, p, momentum, group):
        assert p.dtype != torch.float64 or len(group["params"]) > 2
        super().update(p, momentum, group)


@on(SHARDED)
def test_a_user_may_vouch(system):
    job = Job(steps=3, optimizer=lambda module: FailsInTrials(module.parameters(), lr=0.01))
    with pytest.raises(RuntimeError, match=r"a trial of it .* failed .*trust_optimizer=True"):
        run_ranks(system.num_ranks, fit_on_ranks, dataclasses.replace(job, slots=5))
    check(system, trusted(job))


def test_vouching_is_said_in_one_word():
    assert SwiftMoEStrategy(trust_optimizer=True).trust_optimizer
    with pytest.raises(ValueError, match="trust_optimizer must be True or False, got 'Lion'"):
        SwiftMoEStrategy(trust_optimizer="Lion")


class MuonBesideAdamW(Net):
    """What is advised to whoever wants Muon."""

    automatic_optimization = False

    def configure_optimizers(self):
        experts = [p for moe in self.moes for p in moe.experts.parameters()]
        held = set(experts)
        rest = [p for p in self.parameters() if p not in held]
        dense = [p for p in rest if p.ndim == 2]
        others = [p for p in rest if p.ndim != 2]
        return [torch.optim.Muon(dense, lr=0.02), torch.optim.AdamW([*experts, *others], lr=0.02)]

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@on(SHARDED)
def test_muon_for_dense_weights_beside_adamw_for_experts(system):
    check(system, Job(steps=3, module=MuonBesideAdamW, trainer={"max_steps": 6}))


def test_muon_without_the_experts_is_told_the_same():
    job = Job(slots=3, optimizer=lambda module: torch.optim.Muon([p for p in module.parameters() if p.ndim == 2]))
    message = r"moes\.0\.experts\.up_proj is trainable but in no optimizer \(Muon\).*Muon\(dense\), AdamW\(experts\)"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, fit_on_ranks, job)
