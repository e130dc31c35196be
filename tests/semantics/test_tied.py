"""Two layers that share their experts: one set of weights, gradients of both."""

import pytest
import torch

from tests.jobs import Job, Net, adamw, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import OURS, SHARDED, TIMEOUT_S, System, check, fit

pytestmark = pytest.mark.distributed


class TiedExperts(Net):
    """Each layer has a router of its own."""

    def __init__(self, job):
        super().__init__(job)
        self.moes[1].experts = self.moes[0].experts


class TiedLayers(Net):
    """One layer, used twice in a forward."""

    def __init__(self, job):
        super().__init__(job)
        self.moes[1] = self.moes[0]


class TiedMatrix(Net):
    """Only the down projection is shared."""

    def __init__(self, job):
        super().__init__(job)
        self.moes[1].experts.down_proj = self.moes[0].experts.down_proj


VARIANTS = {
    "sgd": {"optimizer": sgd},
    "adamw": {"optimizer": adamw},
    "proportional": {"policy": "proportional"},
    "clip_and_accumulate": {"trainer": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tied_experts(system, variant):
    check(system, Job(steps=4, module=TiedExperts, **VARIANTS[variant]))


def test_tied_layers(system):
    check(system, Job(steps=4, module=TiedLayers))


class TiedToDense(Net):
    """An expert's matrices, all of them, are also another module's."""

    def __init__(self, job):
        super().__init__(job)
        self.other = torch.nn.Module()
        self.other.weight = self.moes[0].experts.down_proj

    def loss(self, batch):
        return super().loss(batch) + 0.1 * self.other.weight.square().sum()


def fit_or_refuse(system, job):
    try:
        return fit(system, job)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("module", [TiedMatrix, TiedToDense])
def test_a_tied_matrix_is_refused_on_several_ranks(module):
    # Each module of experts is placed on its own, by the loads of its own layers: one matrix cannot follow both.
    job = Job(steps=4, module=module)
    check(OURS[0], job)
    for system in SHARDED:
        for result in run_ranks(system.num_ranks, fit_or_refuse, system, job, timeout_s=TIMEOUT_S):
            assert isinstance(result, str)
            assert "moes.0.experts.down_proj" in result
            assert "\n" not in result


@pytest.mark.parametrize(("num_ranks", "slots"), [(2, 3), (3, 2), (5, 1)])
@pytest.mark.parametrize("policy", ["random", "proportional"])
def test_few_slots(num_ranks, slots, policy):
    # No room to spare: what one layer wanted elsewhere, the other has to follow.
    job = Job(steps=4, batch=30, policy=policy, module=TiedExperts, optimizer=sgd)
    check(System("ours", num_ranks, slots), job)
