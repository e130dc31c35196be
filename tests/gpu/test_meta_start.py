"""Modules on the meta device whose experts are drawn on GPUs."""

import pytest
import torch
import torch.distributed as dist

from tests.gpu.cases import HOPPER, TRANSPORTS, GpuJob, batches, placed, strategy_options
from tests.jobs import Net, largest_error, our_trainer

pytestmark = pytest.mark.gpu


class Meta(Net):
    """Nothing has memory before the fit."""

    def __init__(self, job):
        with torch.device("meta"):
            super().__init__(job)


def fit_in_parts(job):
    """Whether experts are in parts behind each of two fits, and the whole weights."""
    job.strategy = strategy_options(job)
    module = job.module(job)
    part = batches(job, dist.get_rank(), dist.get_world_size())
    torch.manual_seed(7)
    in_parts = []
    for _ in range(2):
        trainer = our_trainer(job, **placed())
        trainer.fit(module, part)
        in_parts.append(all(param.is_meta for moe in module.moes for param in moe.experts.parameters()))
    trainer.strategy.gather_experts()
    return in_parts, {name: value.cpu() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("change", "bound"),
    [({}, 1e-5), ({"precision": "bf16-mixed"}, 2e-2), ({"strategy": {"offload_optimizer": True}}, 1e-5)],
    ids=["fp32", "bf16", "offload"],
)
def test_ranks_equal_one(one, several, transport, change, bound):
    job = GpuJob(width=64, moe=HOPPER, module=Meta, transport=transport, **change)
    ((_, want),) = one.run(fit_in_parts, GpuJob(**{**vars(job), "slots": 6}))
    for in_parts, weights in several.run(fit_in_parts, job):
        assert in_parts == [True, True]
        assert largest_error(weights, want) < bound
