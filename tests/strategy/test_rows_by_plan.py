"""Tokens planned as on a device, carried by all-to-all between CPU ranks: the weights of one process.

Rows are added up in fp32 on that way, so weights in fp64 agree to fp32's rounding only.
"""

import pytest

from lightning_swiftmoe.parallel import setup
from lightning_swiftmoe.parallel.nccl_rows import NcclRows
from tests.jobs import Job, largest_error, train, train_alone
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def train_by_plan(job):
    setup._device_exchanges = lambda transport, tokens, control, bound: (NcclRows(tokens, bound), None)
    return train(job)


VARIANTS = {
    "plain": {},
    "top_2": {"top_k": 2},
    "accumulate": {"trainer": {"accumulate_grad_batches": 3}},
    "swiglu": {"moe": {"activation": "swiglu"}},
    "every_loss": {"moe": {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}},
    "clip": {"trainer": {"gradient_clip_val": 0.05}},
}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_equal_one_process(num_ranks, variant):
    job = Job(slots=-(-5 // num_ranks) + 1, **VARIANTS[variant])
    expected = train_alone(job)
    for result in run_ranks(num_ranks, train_by_plan, job):
        assert largest_error(result, expected) < 1e-5
