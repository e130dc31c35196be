"""Tokens planned as on a device, carried by all-to-all between CPU ranks: the weights of one process.

Rows are added up in fp32 on that way, so weights in fp64 agree to fp32's rounding only.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_swiftmoe import strategy
from lightning_swiftmoe.parallel import setup
from lightning_swiftmoe.parallel.nccl_rows import NcclRows
from lightning_swiftmoe.parallel.rehearsal import rehearse
from tests.gpu.cases import Checkpointed
from tests.jobs import Job, Net, largest_error, train, train_alone
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def train_by_plan(job):
    setup._device_exchanges = lambda transport, tokens, control, bound: (NcclRows(tokens, bound), None)
    return train(job)


class CheckpointedTwice(Net):
    """The backward repeats forwards of which it cannot know which is meant, and plans anew."""

    def forward(self, x):
        x = self.inp(x)
        for moe in self.moes:
            x = x + checkpoint(moe, torch.tanh(x), use_reentrant=False)
            x = x + checkpoint(moe, torch.sin(x), use_reentrant=False)
        return self.out(x)


VARIANTS = {
    "plain": {},
    "top_2": {"top_k": 2},
    "accumulate": {"trainer": {"accumulate_grad_batches": 3}},
    "swiglu": {"moe": {"activation": "swiglu"}},
    "every_loss": {"moe": {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}},
    "clip": {"trainer": {"gradient_clip_val": 0.05}},
    "checkpointed": {"module": Checkpointed},
    "checkpointed_twice": {"module": CheckpointedTwice},
}


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_equal_one_process(num_ranks, variant):
    job = Job(slots=-(-5 // num_ranks) + 1, **VARIANTS[variant])
    expected = train_alone(job)
    for result in run_ranks(num_ranks, train_by_plan, job):
        assert largest_error(result, expected) < 1e-5


def compile_here(layers, parallelism, forward_context, say):
    for layer in layers:
        for moe in layer.moes.values():
            rehearse(moe, torch.float64, parallelism.device)


def train_rehearsed(job):
    strategy.compile_layers = compile_here
    return train_by_plan(job)


def test_a_rehearsal_leaves_nothing_behind():
    job = Job(slots=4, moe={"aux_loss_coef": 0.1})
    expected = train_alone(job)
    for result in run_ranks(2, train_rehearsed, job):
        assert largest_error(result, expected) < 1e-5


def count_plans(job):
    plans = []
    plan = NcclRows.plan
    NcclRows.plan = lambda self, *args, **kwargs: plans.append(args[-1]) or plan(self, *args, **kwargs)
    train_by_plan(job)
    return len(plans)


def test_a_repeated_forward_takes_the_plan_of_the_first():
    steps, layers = 5, 2
    assert run_ranks(2, count_plans, Job(slots=4, module=Checkpointed)) == [steps * layers] * 2
    assert run_ranks(2, count_plans, Job(slots=4, module=CheckpointedTwice)) == [4 * steps * layers] * 2
