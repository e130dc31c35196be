"""Gradients as hooks see them: complete, summed, and every number of them that of one process on every rank."""

import copy

import pytest
import torch

from tests.jobs import Job, Net, full, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import GROUPS, OURS, check, fit, on

pytestmark = pytest.mark.distributed


def gradients(module):
    return {name: full(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


class AfterBackward(Net):
    """Looks where a step's gradients must be complete: after its last micro-batch."""

    def on_after_backward(self):
        if not self.trainer.fit_loop._should_accumulate():
            self.seen.append(gradients(self))


class BeforeStep(Net):
    def on_before_optimizer_step(self, optimizer):
        self.seen.append(gradients(self))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("module", [AfterBackward, BeforeStep])
def test_complete(system, module, accumulate):
    job = Job(steps=2, module=module, trainer={"accumulate_grad_batches": accumulate})
    seen = check(system, job)["seen"]
    assert len(seen) == 2
    assert seen[0].keys() == dict(Net(job).named_parameters()).keys()


class AddsUp(Net):
    """By hand: looks after each of three backwards; nothing is zeroed in between."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for scale in (1.0, 0.5, -2.0):
            self.manual_backward(self.loss(batch) * scale)
            self.seen.append(gradients(self))
        self.optimizers().step()
        self.optimizers().zero_grad()


def test_backwards_add_up(system):
    check(system, Job(steps=2, module=AddsUp))


class Rescales(Net):
    """Edits of ``.grad`` count, in place and as a new tensor."""

    def on_after_backward(self):
        for moe in self.moes:
            moe.experts.down_proj.grad.mul_(3)
            up = moe.experts.up_proj
            up.grad = up.grad * 0.5 + 1e-3 * up.detach()


def test_edits_of_gradients(system):
    check(system, Job(steps=3, optimizer=sgd, module=Rescales), without=Net)


class LooksBetween(Net):
    """After each micro-batch: what adds up of experts is the sum so far, over all ranks."""

    def look(self):
        experts = {name: grad for name, grad in gradients(self).items() if "experts" in name}
        assert len(experts) == 4
        self.seen.append(experts)

    def on_after_backward(self):
        self.look()


class LooksWhenTheBatchIsOver(LooksBetween):
    def on_after_backward(self):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            self.look()


class EditsBetween(Net):
    """Edits count after each micro-batch, the last one and those before it."""

    def on_after_backward(self):
        for moe in self.moes:
            for param in moe.experts.parameters():
                self.edit(param)


class Scales(EditsBetween):
    def edit(self, param):
        param.grad.mul_(1.25)


class ScalesAsData(EditsBetween):
    def edit(self, param):
        param.grad.data *= 1.25


class ScalesAll(EditsBetween):
    def on_after_backward(self):
        torch._foreach_mul_([p.grad for moe in self.moes for p in moe.experts.parameters()], 1.25)


class Replaces(EditsBetween):
    def edit(self, param):
        param.grad = param.grad * 0.5 + 1e-3 * param.detach()


class ZeroesTheLarge(EditsBetween):
    def edit(self, param):
        param.grad = torch.where(param.grad.abs() > 1e-2, 0.0, param.grad)


class LooksAndDrops(EditsBetween):
    """Once looked at, what is dropped is gone as well."""

    def edit(self, param):
        self.seen.append(param.grad.norm().item())
        if self.trainer.fit_loop.batch_idx % 3 == 1:
            param.grad = None


class DropsAndLooks(EditsBetween):
    """A look at one brings back no other that was dropped before it."""

    def on_after_backward(self):
        if self.trainer.fit_loop.batch_idx % 3 == 1:
            self.moes[1].experts.up_proj.grad = None
            self.seen.append(self.moes[1].experts.down_proj.grad.norm().item())
            self.seen.append(self.moes[1].experts.up_proj.grad is None)


class DropsToZeros(EditsBetween):
    def on_after_backward(self):
        if self.trainer.fit_loop.batch_idx % 3 == 1:
            self.moes[0].experts.zero_grad(set_to_none=False)


class Regularized(Scales):
    """Autograd itself has something for the Parameters, beside what goes through the layers."""

    def loss(self, batch):
        return super().loss(batch) + sum(p.square().sum() for p in self.parameters()) * 0.01


# A Parameter is in parts, and whole beside another expert group; one in parts of a group shows the same again.
WAITING = [*OURS, GROUPS[1], pytest.param(GROUPS[0], marks=pytest.mark.exhaustive)]
LOOKS = [LooksBetween, LooksWhenTheBatchIsOver]
EDITS = [
    Scales,
    ScalesAsData,
    ScalesAll,
    Replaces,
    ZeroesTheLarge,
    LooksAndDrops,
    DropsAndLooks,
    DropsToZeros,
    Regularized,
]


@on(WAITING)
@pytest.mark.parametrize("module", LOOKS + EDITS)
def test_between_micro_batches(system, module):
    job = Job(steps=6, optimizer=sgd, module=module, trainer={"accumulate_grad_batches": 3})
    check(system, job, without=Net if module in EDITS else None)


OFFLOADED = {"offload_optimizer": True}
BOUND = {"optimizer_state": "bound"}


@pytest.mark.parametrize(
    ("system", "strategy"),
    [(OURS[0], OFFLOADED), (OURS[1], OFFLOADED), (GROUPS[1], OFFLOADED), (OURS[1], BOUND)],
    ids=str,
)
@pytest.mark.parametrize("module", [LooksAndDrops, Replaces])
def test_between_micro_batches_elsewhere(system, module, strategy):
    job = Job(steps=6, optimizer=sgd, module=module, strategy=strategy, trainer={"accumulate_grad_batches": 3})
    check(system, job, without=Net)


class LooksInEveryWay(Net):
    """What torch's functions do not pass: the first look, which waits, finds what the second one does."""

    ways = (
        lambda grad: grad.to_local(),
        lambda grad: grad.full_tensor(),
        lambda grad: grad.redistribute(placements=grad.placements).to_local(),
        repr,
        lambda grad: copy.deepcopy(grad).to_local(),
    )

    def on_after_backward(self):
        way = self.ways[self.trainer.fit_loop.batch_idx % len(self.ways)]
        grad = self.moes[0].experts.up_proj.grad
        first, second = str(way(grad)), str(way(grad))
        assert first == second
        assert first != str(way(grad.mul_(0)))


@on([OURS[1]])
def test_every_look(system):
    run_ranks(2, fit, system, Job(steps=6, module=LooksInEveryWay, trainer={"accumulate_grad_batches": 6}))


class LooksInside(Net):
    """While a backward runs: what there was before it."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(self.look)
        return loss

    def look(self, _):
        grad = self.moes[0].experts.up_proj.grad
        self.seen.append(None if grad is None else grad.square().sum().item())


@on(WAITING)
def test_inside_of_a_backward(system):
    check(system, Job(steps=6, module=LooksInside, trainer={"accumulate_grad_batches": 3}))


NUMBERS = {
    "norms": {
        "norm": lambda t: t.norm().item(),
        "flat": lambda t: float(t.flatten().norm()),
        "inf": lambda t: t.norm(float("inf")).item(),
        "vector_norm": lambda t: torch.linalg.vector_norm(t, 1).item(),
        "printed": lambda t: f"{t.norm():.6f}",
    },
    "sums": {
        "sum": lambda t: t.sum().item(),
        "mean": lambda t: float(t.mean()),
        "squares": lambda t: t.square().sum().sqrt().item(),
        "power": lambda t: (t**2).sum().item(),
        "zeros": lambda t: int((t == 0).sum()),
    },
    "extremes": {
        "max": lambda t: t.abs().max().item(),
        "min": lambda t: t.min().item(),
        "nan": lambda t: bool(torch.isnan(t).any()),
        "finite": lambda t: bool(torch.isfinite(t).all()),
        "above": lambda t: bool(t.abs().max() > 1e-3),
    },
}
"""Ways to make a number of a tensor that people write in hooks."""


class Numbers(Net):
    """Every number of every parameter and gradient, in both hooks."""

    def note(self):
        for name, p in self.named_parameters():
            for what, tensor in (("weight", p), ("gradient", p.grad)):
                self.seen.append({f"{name} {what} {key}": number(tensor) for key, number in self.numbers.items()})

    def on_after_backward(self):
        self.note()

    def on_before_optimizer_step(self, optimizer):
        self.note()


@pytest.mark.parametrize("numbers", NUMBERS)
def test_numbers(system, numbers):
    module = type("Numbers", (Numbers,), {"numbers": NUMBERS[numbers]})
    # Two rows: a third rank has none, and a number of nothing (0, -inf, an error) must not come through.
    check(system, Job(steps=1, module=module, moe={"ffn_size": 2}))


class Totals(Net):
    """Numbers over all parameters, experts and others."""

    def on_before_optimizer_step(self, optimizer):
        grads = [p.grad for p in self.parameters()]
        self.seen += [
            float(sum(g.square().sum() for g in grads)),
            float(torch.stack([g.norm() for g in grads]).norm()),
            float(torch.cat([g.flatten().abs() for g in grads]).max()),
            float(torch.nn.utils.get_total_norm(grads)),
            max(g.abs().max().item() for g in grads),
            sum(p.numel() for p in self.parameters()),
        ]


def test_totals(system):
    check(system, Job(steps=2, module=Totals, moe={"ffn_size": 2}))


class Guards(Net):
    """Skips a step whose gradients are not finite; on the second step one element of one expert is not."""

    poison = float("nan")

    def on_after_backward(self):
        if self.trainer.global_step == 1:
            for moe in self.moes:
                grad = moe.experts.up_proj.grad
                spot = torch.zeros(grad.shape, dtype=torch.bool)
                spot[3, -1, 0] = True  # in the last rank's rows
                moe.experts.up_proj.grad = torch.where(spot, self.poison, grad)

    def on_before_optimizer_step(self, optimizer):
        bad = any(self.is_bad(p.grad) for p in self.parameters())
        self.seen.append(bad)
        if bad:
            self.zero_grad()

    def is_bad(self, grad):
        return bool(torch.isnan(grad).any())


class GuardsByNorm(Guards):
    """The same, through a norm."""

    poison = 1e6

    def is_bad(self, grad):
        return grad.norm() > 100


class GuardsByTruth(Guards):
    """The same, without ``bool()``."""

    def is_bad(self, grad):
        return not torch.isfinite(grad).all()


@pytest.mark.parametrize("module", [Guards, GuardsByNorm, GuardsByTruth])
def test_a_guard_takes_the_same_branch_everywhere(system, module):
    class Tells(module):
        def is_bad(self, grad):
            return bool(super().is_bad(grad))

    seen = check(system, Job(steps=3, module=Tells))["seen"]
    assert seen == [False, True, False]


class Fills(Net):
    """A gradient that the user makes: noise that every rank draws alike."""

    def on_after_backward(self):
        generator = torch.Generator().manual_seed(self.trainer.global_step)
        for p in self.parameters():
            p.grad.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.01)


@on(OURS)
def test_whole_tensors_added_to_gradients(system):
    check(system, Job(steps=3, optimizer=sgd, module=Fills), without=Net)
