"""``precision="16-mixed"``: one loss scale for all ranks, which skip a step together, and auxiliary losses under it.

Lightning turns the word into bf16 on a CPU; the plugin itself works there.
"""

import dataclasses

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_swiftmoe import ExpertRebalancer, SwiftMoEStrategy
from tests.jobs import Job, Net, data, largest_error, make_trainer, our_trainer, sgd
from tests.ranks import Ranks, run_ranks

pytestmark = pytest.mark.distributed

JOB = Job(num_experts=4, slots=4, steps=5, precision="16-mixed", moe={"aux_loss_coef": 0.05}, optimizer=sgd)


def half(init_scale=2.0**10, **kwargs):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, **kwargs))


class Scales(pl.Callback):
    """The loss scale after every step, and whether weights changed in it."""

    def __init__(self):
        self.scales, self.changed, self.before = [], [], None

    def on_train_batch_start(self, trainer, module, *_):
        self.before = [param.detach().clone() for param in module.parameters()]

    def on_train_batch_end(self, trainer, module, *_):
        scaler = trainer.precision_plugin.scaler
        self.scales.append(None if scaler is None else scaler.get_scale())
        pairs = zip(self.before, module.parameters(), strict=True)
        self.changed.append([bool((old != new).any()) for old, new in pairs])


def fit(job, plugin, alone=False, ckpt_path=None, save=None):
    """Weights, losses, scales, and which Parameters changed in each step."""
    scales = Scales()
    job = dataclasses.replace(job, callbacks=lambda: [scales])
    module = job.module(job)
    if alone:
        trainer = make_trainer(job, callbacks=[scales], precision=None, plugins=[plugin])
    else:
        trainer = make_our_trainer(job, plugin)
    rank, num_ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    trainer.fit(module, data(job, rank, num_ranks), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module.state_dict(), module.losses, scales.scales, scales.changed


def make_our_trainer(job, plugin):
    strategy = SwiftMoEStrategy(slots_per_rank=job.slots, **{"timeout": 30, **job.strategy})
    callbacks = [*job.callbacks(), ExpertRebalancer(job.policy)]
    return make_trainer(
        job,
        strategy,
        num_nodes=dist.get_world_size(),
        callbacks=callbacks,
        precision=None,
        plugins=[plugin, Ranks()],
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_train_as_one_process_does(num_ranks):
    expected = fit(JOB, half(), alone=True)
    for weights, _, scales, _ in run_ranks(num_ranks, fit, JOB, half()):
        assert scales == expected[2]
        assert largest_error(weights, expected[0]) < 5e-3


def test_close_to_full_precision():
    """Auxiliary losses included: with this factor they move the routers more than the loss does."""
    job = dataclasses.replace(JOB, moe={"aux_loss_coef": 20.0})
    wide = dataclasses.replace(job, precision="32-true")
    expected = run_ranks(2, fit_wide, wide)[0]
    for weights in (run_ranks(2, fit, job, half())[0][0], fit(job, half(), alone=True)[0]):
        routers = {name: weight for name, weight in weights.items() if "router" in name}
        assert routers
        assert largest_error(routers, {name: expected[name] for name in routers}) < 3e-2


def fit_wide(job):
    module, trainer = Net(job), our_trainer(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return module.state_dict()


class OverflowsOnce(Net):
    """In the second step one gradient overflows, which rank 0 alone has in its shard; nothing dense does."""

    def on_after_backward(self):
        if self.trainer.global_step == 1 and not getattr(self, "did", False):
            self.did = True
            weight = dict(self.named_parameters())["moes.0.experts.down_proj"]
            with torch.no_grad():
                weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_all_skip_together(num_ranks, fused):
    """The scale falls by half, no Parameter changes on any rank, and the steps after it are one process's."""
    job = dataclasses.replace(JOB, module=OverflowsOnce, optimizer=FUSED if fused else JOB.optimizer)
    expected = fit(job, half(), alone=True)
    assert expected[2][:3] == [1024.0, 512.0, 512.0]
    assert not any(expected[3][1])
    for weights, _, scales, changed in run_ranks(num_ranks, fit, job, half()):
        assert scales == expected[2]
        assert not any(changed[1])
        assert all(changed[2])
        assert largest_error(weights, expected[0]) < 5e-3


class DenseOverflowsOnce(Net):
    """The same of a dense gradient, in a row that rank 0 alone has where FSDP2 cuts it."""

    def on_after_backward(self):
        if self.trainer.global_step == 1 and not getattr(self, "did", False):
            self.did = True
            with torch.no_grad():
                self.inp.weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize("fused", [False, True])
def test_all_skip_together_where_dense_weights_are_cut(fused):
    optimizer = FUSED if fused else JOB.optimizer
    job = dataclasses.replace(JOB, module=DenseOverflowsOnce, optimizer=optimizer, strategy={"dense": "fsdp2"})
    expected = fit(job, half(), alone=True)
    for weights, _, scales, changed in run_ranks(2, fit, job, half()):
        assert scales == expected[2]
        assert not any(changed[1])
        assert all(changed[2])
        assert largest_error(weights, expected[0]) < 5e-3


def FUSED(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, fused=True)


def PLAIN(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def test_the_scale_is_saved_and_the_users_scaler_goes_on(tmp_path):
    path = str(tmp_path / "half.ckpt")
    growing = {"growth_interval": 2}
    whole = run_ranks(2, fit, JOB, half(**growing))[0]
    first = dataclasses.replace(JOB, trainer={"max_steps": 3})
    run_ranks(2, fit, first, half(**growing), False, None, path)
    weights, losses, scales, _ = run_ranks(2, fit, JOB, half(**growing), False, path)[0]
    assert scales == whole[2][3:]
    assert losses == whole[1][3:]
    assert all(torch.equal(weights[name], value) for name, value in whole[0].items())


def scale_of_the_plugin(job):
    plugin = half(growth_interval=2)
    own = plugin.scaler
    fit(job, plugin)
    return plugin.scaler is own, own.get_scale()


def test_the_plugin_has_its_own_scaler_again():
    assert run_ranks(2, scale_of_the_plugin, JOB) == [(True, 4096.0)] * 2


CLIPPED = dataclasses.replace(JOB, trainer={"gradient_clip_val": 0.05})


def bf16():
    return MixedPrecision("bf16-mixed", "cpu")


@pytest.mark.parametrize("make_plugin", [half, bf16])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gradients_of_a_fused_optimizer_are_clipped(num_ranks, make_plugin):
    """Lightning refuses that; one process steps by an optimizer that is not fused."""
    clipped = fit(dataclasses.replace(CLIPPED, optimizer=PLAIN), make_plugin(), alone=True)[0]
    free = fit(dataclasses.replace(JOB, optimizer=PLAIN), make_plugin(), alone=True)[0]
    assert largest_error(free, clipped) > 0.1
    for weights, *_ in run_ranks(num_ranks, fit, dataclasses.replace(CLIPPED, optimizer=FUSED), make_plugin()):
        assert largest_error(weights, clipped) < 5e-3


class ClipsByHand(Net):
    """In manual optimization gradients are still scaled by fp16's loss scale where a user clips them."""

    def __init__(self, job):
        super().__init__(job)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05)
        optimizer.step()


def test_scaled_gradients_of_a_fused_optimizer_are_not_clipped():
    job = dataclasses.replace(JOB, module=ClipsByHand, optimizer=FUSED)
    with pytest.raises(Exception, match="does not allow for gradient clipping"):
        run_ranks(2, fit, job, half())


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("job", [JOB, CLIPPED])
@pytest.mark.parametrize("optimizer", [PLAIN, FUSED])
def test_a_scaler_that_is_switched_off(num_ranks, job, optimizer):
    """fp16 whose gradients nobody scales: they are clipped as they are."""
    off = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False))
    expected = fit(dataclasses.replace(job, optimizer=PLAIN), off, alone=True)[0]
    for weights, *_ in run_ranks(num_ranks, fit, dataclasses.replace(job, optimizer=optimizer), off):
        assert largest_error(weights, expected) < 5e-3


class SkipsOnce(Net):
    """The second step has no loss, which Lightning allows on one rank."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


@pytest.mark.parametrize("optimizer", [PLAIN, FUSED])
def test_a_step_without_gradients_clips_nothing(optimizer):
    job = dataclasses.replace(CLIPPED, module=SkipsOnce, optimizer=optimizer)
    expected = fit(dataclasses.replace(job, optimizer=PLAIN), half(), alone=True)[0]
    weights = run_ranks(1, fit, job, half())[0][0]
    assert largest_error(weights, expected) < 5e-3


def test_the_trainer_has_the_users_plugin_again():
    assert run_ranks(2, plugins_of_the_trainer, CLIPPED) == [(False, True)] * 2


class Plugins(pl.Callback):
    """The trainer's plugin while it trains."""

    def on_train_batch_end(self, trainer, *_):
        self.seen = trainer.precision_plugin


def plugins_of_the_trainer(job):
    """Whether the trainer has the user's plugin while it trains, and afterwards."""
    plugin, seen = bf16(), Plugins()
    trainer = make_our_trainer(dataclasses.replace(job, callbacks=lambda: [seen]), plugin)
    trainer.fit(Net(job), data(job, dist.get_rank(), dist.get_world_size()))
    return seen.seen is plugin, trainer.precision_plugin is plugin
