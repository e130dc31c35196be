"""The optimizer holds the module's own Parameters, whoever made it and whenever."""

import numpy as np
import pytest
import torch

from lightning_swiftmoe.trace_file import read_trace
from tests.jobs import Job, Net, adamw, full, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import OURS, SHARDED, TIMEOUT_S, alone, check, fit, on, same

pytestmark = pytest.mark.distributed


class Holds(Net):
    """Who is in the groups, and what state they have, between steps and inside one."""

    def look(self):
        optimizer = self.optimizers(use_pl_optimizer=False)
        names = {id(p): name for name, p in self.named_parameters()}
        self.seen.append([[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups])
        self.seen.append([[list(p.shape) for p in group["params"]] for group in optimizer.param_groups])
        self.seen.append(sorted(names.get(id(p), "unknown") for p in optimizer.state))
        for p, state in optimizer.state.items():
            tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim}
            self.seen.append({key: list(value.shape) for key, value in tensors.items()})
            self.seen.append({f"{names.get(id(p))} {key}": full(value).clone() for key, value in tensors.items()})

    def on_fit_start(self):
        self.seen.append(len(list(self.parameters())))

    def on_train_start(self):
        self.look()

    def on_before_optimizer_step(self, optimizer):
        self.look()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.look()


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_groups_and_state(system, optimizer):
    seen = check(system, Job(steps=2, optimizer=optimizer, module=Holds))["seen"]
    assert {name for group in seen[1] for name in group} == dict(Net(Job()).named_parameters()).keys()


class MadeInInit(Net):
    """An optimizer older than ``fit``."""

    def __init__(self, job):
        super().__init__(job)
        self.optimizer = job.optimizer(self)

    def configure_optimizers(self):
        return self.optimizer


class ListInInit(Net):
    """A list of Parameters older than ``fit``, used in the loss and in a hook."""

    def __init__(self, job):
        super().__init__(job)
        self.decayed = [moe.experts.down_proj for moe in self.moes]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * sum(p.square().sum() for p in self.decayed)

    def on_after_backward(self):
        for p in self.decayed:
            p.grad.mul_(0.5)


class ListForOptimizer(ListInInit):
    """The same list makes a group."""

    def configure_optimizers(self):
        held = {id(p) for p in self.decayed}
        rest = [p for p in self.parameters() if id(p) not in held]
        return torch.optim.SGD([{"params": rest}, {"params": self.decayed, "lr": 0.02}], lr=0.1)


def fit_or_refuse(system, job):
    try:
        return fit(system, job)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("module", [MadeInInit, ListInInit, ListForOptimizer])
def test_parameters_older_than_fit_work_or_are_refused_by_name(system, module):
    job = Job(steps=3, optimizer=sgd, module=module)
    expected = alone(system, job)
    for result in run_ranks(system.num_ranks, fit_or_refuse, system, job, timeout_s=TIMEOUT_S):
        if isinstance(result, str) and system in SHARDED:
            assert "moes.0.experts." in result
            assert "\n" not in result
        else:
            same(result, expected, 1e-9, str(system))


def halve(param):
    param.grad.mul_(0.5)


class Hooked(Net):
    """A hook on a Parameter before ``fit``, as loggers of gradients add them."""

    def __init__(self, job):
        super().__init__(job)
        self.moes[1].experts.down_proj.register_hook(lambda grad: grad * 0.5)


class HookedAfter(Net):
    def __init__(self, job):
        super().__init__(job)
        self.moes[1].experts.down_proj.register_post_accumulate_grad_hook(halve)


@pytest.mark.parametrize("module", [Hooked, HookedAfter])
def test_hooks_on_expert_parameters(module):
    job = Job(steps=3, optimizer=sgd, module=module)
    check(OURS[0], job, without=Net)
    for system in SHARDED:
        for result in run_ranks(system.num_ranks, fit_or_refuse, system, job, timeout_s=TIMEOUT_S):
            assert isinstance(result, str), "neither refused nor heard"
            assert "moes.1.experts.down_proj" in result
            assert "hook" in result


class HookedDense(Net):
    """Hooks on other Parameters are nobody's business."""

    def __init__(self, job):
        super().__init__(job)
        self.inp.weight.register_hook(lambda grad: grad * 0.5)


def test_hooks_on_other_parameters(system):
    check(system, Job(steps=3, optimizer=sgd, module=HookedDense), without=Net)


class Two(Net):
    """Both optimizers hold experts; one forward and backward, then both step."""

    automatic_optimization = False

    def configure_optimizers(self):
        params = list(self.parameters())
        return [torch.optim.SGD(params[::2], lr=0.1, momentum=0.9), torch.optim.Adam(params[1::2], lr=0.02)]

    def count(self, batch):
        """What the routers were asked, from the outside."""
        counts = []
        hooks = [
            moe.router.register_forward_hook(lambda module, args, routing: counts.append(routing.counts.tolist()))
            for moe in self.moes
        ]
        loss = self.loss(batch)
        for hook in hooks:
            hook.remove()
        return loss, counts

    def training_step(self, batch, batch_idx):
        loss, counts = self.count(batch)
        self.seen.append(counts)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class TakesTurns(Two):
    """A forward and backward for each."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss, counts = self.count(batch)
            self.seen.append(counts)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


class EveryOther(Two):
    """The second optimizer steps on every other batch."""

    def training_step(self, batch, batch_idx):
        loss, counts = self.count(batch)
        self.seen.append(counts)
        self.manual_backward(loss)
        first, second = self.optimizers()
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()


@pytest.mark.parametrize("module", [Two, TakesTurns, EveryOther])
@on(OURS)
def test_two_optimizers_that_hold_experts(system, module, tmp_path):
    # Lightning counts every optimizer's step.
    job = Job(steps=4, module=module, trainer={"max_steps": 8 if module is not EveryOther else 6})
    job.rebalancer = {"trace": tmp_path / "trace.npy.gz"}
    expected = alone(system, job)
    results = run_ranks(system.num_ranks, fit, system, job, timeout_s=TIMEOUT_S)
    for result in results:
        same(result["weights"], expected["weights"], 1e-9, str(system))
    seen = np.array([result["seen"] for result in results])  # [ranks, forwards, layers, experts]
    np.testing.assert_array_equal(seen.sum(axis=0), np.array(expected["seen"]))
    counts = read_trace(tmp_path / "trace.npy.gz")["counts"]  # [steps, layers, ranks, experts]
    np.testing.assert_array_equal(counts.sum(axis=0), seen.sum(axis=1).swapaxes(0, 1))
    assert counts.sum(axis=(1, 2, 3)).all(), "a record of a step without tokens"
