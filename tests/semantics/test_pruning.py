"""Pruning and parametrizations: of dense layers they do what they do in one process, of experts they are refused."""

import dataclasses

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch.nn.utils import parametrizations, prune

from tests.jobs import Job, Net, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import OURS, TIMEOUT_S, check, fit, on

pytestmark = pytest.mark.distributed


class Doubles(Net):
    """In 64 bits from the start: the callback copies weights before Lightning converts them."""

    def __init__(self, job):
        super().__init__(job)
        self.double()

    def on_train_end(self):
        self.seen.append({name: (layer.weight == 0).sum().item() for name, layer in self.pruned()})

    def pruned(self):
        return [("inp", self.inp), ("router", self.moes[0].router)]


def prunes_dense():
    return [ModelPruning("l1_unstructured", amount=0.4, use_global_unstructured=False)]


def test_pruning_dense_layers(system):
    """Weights of routers and of linear layers, after every epoch; biases are left out by the callback's names."""
    job = Job(steps=2, trainer={"max_steps": 6}, module=Doubles, optimizer=sgd, callbacks=prunes_dense)
    zeros = check(system, job)["seen"][0]
    assert zeros["inp"] > 18  # of 36
    assert zeros["router"] > 15  # of 30


class Weighs(Net):
    def __init__(self, job):
        super().__init__(job)
        parametrizations.weight_norm(self.inp, "weight")


def test_weight_norm_of_a_dense_layer(system):
    check(system, Job(steps=3, module=Weighs))


def refused(system, job):
    """What this rank said, and how many steps it took before."""
    losses = []

    class Counts(job.module):
        def loss(self, batch):
            losses.append(1)
            return super().loss(batch)

    try:
        fit(system, dataclasses.replace(job, module=Counts))
    except ValueError as error:
        return str(error), len(losses)
    return "trained", len(losses)


class PrunesExperts(ModelPruning):
    PARAMETER_NAMES = ("up_proj", "down_proj")

    def __init__(self):
        super().__init__("l1_unstructured", amount=0.5, use_global_unstructured=False)


class PrunedBefore(Net):
    def __init__(self, job):
        super().__init__(job)
        prune.l1_unstructured(self.moes[1].experts, "up_proj", amount=0.5)


class Normed(Net):
    def __init__(self, job):
        super().__init__(job)
        parametrizations.weight_norm(self.moes[1].experts, "down_proj")


class PrunedDuring(Net):
    when = 2

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == self.when:
            prune.l1_unstructured(self.moes[1].experts, "up_proj", amount=0.5)


class PrunedLast(PrunedDuring):
    when = 4


@on(OURS)
@pytest.mark.parametrize(
    ("module", "callbacks", "words", "steps"),
    [
        (Net, lambda: [PrunesExperts()], "PrunesExperts prunes moes.0.experts.up_proj", 0),
        (PrunedBefore, list, "moes.1.experts.up_proj is no Parameter any more", 0),
        (Normed, list, "moes.1.experts.down_proj is no Parameter any more", 0),
        (PrunedDuring, list, "moes.1.experts.up_proj is no Parameter any more", 2),
        (PrunedLast, list, "moes.1.experts.up_proj is no Parameter any more", 4),
    ],
)
def test_of_experts_is_refused(system, module, callbacks, words, steps):
    job = Job(steps=4, module=module, callbacks=callbacks, optimizer=sgd)
    for said, taken in run_ranks(system.num_ranks, refused, system, job, timeout_s=TIMEOUT_S):
        assert words in said
        assert "on_train_batch_end" in said  # the way out
        assert "\n" not in said
        assert taken == steps


class Masks(Net):
    """The way out: half of every matrix stays zero."""

    def on_train_start(self):
        generator = torch.Generator().manual_seed(5)
        experts = [p for moe in self.moes for p in moe.experts.parameters()]
        self.masks = [(p, (torch.rand(p.shape, generator=generator) < 0.5).to(p.dtype)) for p in experts]

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for p, mask in self.masks:
            p.mul_(mask)


def test_masks_by_hand(system):
    check(system, Job(steps=4, module=Masks, optimizer=sgd), without=Net)
