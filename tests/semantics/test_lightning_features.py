"""What worked before the experts became sharded Parameters: schedules, optimizers, Trainer flags, checkpointing."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_swiftmoe import MoE
from tests.jobs import WIDTH, Job, Net, adamw, data, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import ALONE, OURS, TIMEOUT_S, check, difference, trainer_of
from tests.strategy.test_elementwise import Lion

pytestmark = pytest.mark.distributed


@pytest.fixture(params=[OURS[0], OURS[2]], ids=str)
def system(request):
    """DDP passes all of these too; they are many, and about us."""
    return request.param


def scheduled(make, **config):
    def optimizer(module):
        adam = adamw(module)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": make(adam), "interval": "step", **config}}

    return optimizer


def decay_groups(module):
    """Weight decay for matrices only, as most recipes have it."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    rest = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.03)


def group_of_each(module):
    """Rates by depth."""
    return torch.optim.AdamW([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(module.parameters())])


def all_params(cls, **kwargs):
    return lambda module: cls(module.parameters(), **kwargs)


OPTIMIZERS = {
    "one_cycle": scheduled(lambda adam: torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, total_steps=5)),
    "lambda": scheduled(lambda adam: torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 / (1 + step))),
    "lion": all_params(Lion, lr=0.01),
    "amsgrad": all_params(torch.optim.AdamW, lr=0.03, amsgrad=True),
    "fused": all_params(torch.optim.AdamW, lr=0.03, fused=True),
    "foreach": all_params(torch.optim.AdamW, lr=0.03, foreach=True),
    "for_loop": all_params(torch.optim.AdamW, lr=0.03, foreach=False),
    "sgd_foreach": all_params(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "maximize": all_params(torch.optim.SGD, lr=0.01, maximize=True),
    "tensor_lr": all_params(torch.optim.AdamW, lr=torch.tensor(0.03)),
    "rprop": all_params(torch.optim.Rprop, lr=0.01),
    "nadam": all_params(torch.optim.NAdam, lr=0.01),
    "decay_groups": decay_groups,
    "group_of_each": group_of_each,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(system, optimizer):
    check(system, Job(steps=4, optimizer=OPTIMIZERS[optimizer]))


class Validates(Net):
    """Every rank validates on the same batches."""

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val", loss, sync_dist=True)
        self.seen.append(loss.item())

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"])


def test_plateau(system):
    def plateau(adam):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5, patience=0, threshold=0.9)

    optimizer = scheduled(plateau, interval="step", monitor="val", frequency=1, strict=False)
    trainer = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    seen = check(system, Job(steps=6, optimizer=optimizer, module=Validates, trainer=trainer))["seen"]
    assert 0.025 in seen  # halved at least once


class Configures(Net):
    """Layers made in ``configure_model``; Lightning calls it again for every entry point."""

    def __init__(self, job):
        super().__init__(job)
        self.moes = None

    def configure_model(self):
        if self.moes is None:
            torch.manual_seed(9)
            self.moes = torch.nn.ModuleList([MoE(WIDTH, 5, self.job.num_experts, **self.job.moe) for _ in range(2)])


class Recomputes(Net):
    """Activation checkpointing around each layer."""

    reentrant = False

    def forward(self, x):
        x = self.inp(x)
        for moe in self.moes:
            x = x + checkpoint(moe, torch.tanh(x), use_reentrant=self.reentrant)
        return self.out(x)


class RecomputesReentrant(Recomputes):
    reentrant = True


@pytest.mark.parametrize("module", [Configures, Recomputes, RecomputesReentrant])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_modules(system, module, accumulate):
    trainer = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1}
    # Looking for unused parameters and reentrant checkpointing do not go together in DDP.
    strategy = {"find_unused_parameters": False}
    check(system, Job(steps=3, optimizer=sgd, module=module, trainer=trainer, strategy=strategy))


FLAGS = {
    "overfit_batches": {"overfit_batches": 2},
    "fast_dev_run": {"fast_dev_run": 2},
    "limit_train_batches": {"limit_train_batches": 2},
    "detect_anomaly": {"detect_anomaly": True},
    "no_inference_mode": {"inference_mode": False},
}


def fit_several(system, job, num_fits):
    """On a list of batches, which every flag of the Trainer takes, as often as asked."""
    job = system.job(job)
    rank, num_ranks = (0, 1) if system is ALONE else (dist.get_rank(), dist.get_world_size())
    batches = DataLoader(list(data(job, rank, num_ranks)), batch_size=None)
    held_out = DataLoader(list(data(dataclasses.replace(job, steps=1))), batch_size=None)
    module = job.module(job)
    for _ in range(num_fits):
        trainer = trainer_of(system, job)
        trainer.fit(module, batches, held_out)
    return module.state_dict(), trainer.global_step


@pytest.mark.parametrize(("flag", "num_fits"), [*((flag, 1) for flag in FLAGS), (None, 2)])
def test_flags(system, flag, num_fits):
    job = Job(steps=4, trainer=FLAGS.get(flag, {}))
    weights, steps = fit_several(ALONE, system.job(job), num_fits)
    assert steps > 0
    for result, result_steps in run_ranks(system.num_ranks, fit_several, system, job, num_fits, timeout_s=TIMEOUT_S):
        assert difference(result, weights) < 1e-9
        assert result_steps == steps
