"""FSDP2: every block one unit with its experts, which are gathered like any other parameter.

Parameters travel in bf16 and gradients in fp32. Blocks are freed behind the forward pass and gathered again for the
backward (``reshard=false`` keeps them). As FSDP2 does it, the residual stream is bf16 too, not fp32 as in autocast.
Experts of a model of transformers are computed by its own ``grouped_mm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_swiftmoe.cli._peers.folder_model import BUILT_IN, FolderLM, fill_in
from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter
from lightning_swiftmoe.cli._peers.plain import precision_policy, sharded_step, start_ranks, sum_gradients, train
from lightning_swiftmoe.models import FolderModel


def run(job: Job, meter: Meter) -> None:
    """Train."""
    start_ranks(job)
    net, blocks, loss_of = build(job)
    mesh = init_device_mesh(job.device.type, (job.num_ranks,), mesh_dim_names=("fsdp",))
    policy = precision_policy(job)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=job.plan.reshard)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    sum_gradients(net)
    optimizer = job.build_optimizer(net)
    limit = job.config.trainer.gradient_clip_val or 0.0

    def clip() -> None:
        if limit:
            torch.nn.utils.clip_grad_norm_(net.parameters(), limit)

    train(job, meter, sharded_step(job, loss_of, optimizer, clip))


def build(job: Job) -> tuple[nn.Module, nn.ModuleList, Callable[..., Any]]:
    """The model, its blocks, and its loss."""
    if not isinstance(job.model, FolderModel):
        gpt = job.build_replaying_gpt()
        return gpt, gpt.blocks, gpt.loss
    holder = nn.Module()  # with the names that weights are drawn by
    holder.net = net = FolderLM(job.model, BUILT_IN)
    fill_in(holder, job.config.seed, job.device)
    lists = [part for part in net.modules() if isinstance(part, nn.ModuleList)]
    blocks = max(lists, key=lambda part: sum(param.numel() for param in part.parameters()))
    return net, blocks, net
