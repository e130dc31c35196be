"""FSDP2: every block one unit with its experts, which are gathered like any other parameter.

Parameters travel in bf16 and gradients in fp32. Blocks are freed behind the forward pass and gathered again for the
backward (``reshard=false`` keeps them). As FSDP2 does it, the residual stream is bf16 too, not fp32 as in autocast.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter
from lightning_swiftmoe.cli._peers.plain import precision_policy, sharded_step, start_ranks, sum_gradients, train


def run(job: Job, meter: Meter) -> None:
    """Train."""
    start_ranks(job)
    gpt = job.build_replaying_gpt()
    mesh = init_device_mesh(job.device.type, (job.num_ranks,), mesh_dim_names=("fsdp",))
    policy = precision_policy(job)
    for block in gpt.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=job.plan.reshard)
    fully_shard(gpt, mesh=mesh, mp_policy=policy)
    sum_gradients(gpt)
    optimizer = job.build_optimizer(gpt)
    limit = job.config.trainer.gradient_clip_val or 0.0

    def clip() -> None:
        if limit:
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), limit)

    train(job, meter, sharded_step(job, gpt.loss, optimizer, clip))
