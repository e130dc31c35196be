"""Two layers that share their experts: one set of weights, gradients of both."""

import pytest

from tests.jobs import Job, Net, adamw, sgd
from tests.semantics.systems import System, check

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


@pytest.mark.parametrize("module", [TiedLayers, TiedMatrix])
def test_other_ties(system, module):
    check(system, Job(steps=4, module=module))


@pytest.mark.parametrize(("num_ranks", "slots"), [(2, 3), (3, 2), (5, 1)])
@pytest.mark.parametrize("policy", ["random", "proportional"])
def test_few_slots(num_ranks, slots, policy):
    # No room to spare: what one layer wanted elsewhere, the other has to follow.
    job = Job(steps=4, batch=30, policy=policy, module=TiedExperts, optimizer=sgd)
    check(System("ours", num_ranks, slots), job)
