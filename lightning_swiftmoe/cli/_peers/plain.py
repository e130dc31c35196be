"""The training loop of the peers that are not Lightning's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer

from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter


def train(job: Job, meter: Meter, step: Callable[[Tensor], Tensor]) -> None:
    """Call ``step``, which takes this rank's tokens and returns its loss, for every batch."""
    for index, batch in enumerate(job.batches()):
        meter.before_step(index)
        loss = step(batch)
        meter.after_step(index, loss)


def start_ranks(job: Job) -> None:
    """The process group, from the environment that the driver made."""
    if job.device.type == "cuda":
        dist.init_process_group("nccl", device_id=job.device)
    else:
        dist.init_process_group("gloo")


def precision_policy(job: Job) -> MixedPrecisionPolicy:
    """bf16 parameters, fp32 gradients between ranks; or nothing changed."""
    if not job.low_precision:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sum_gradients(model: nn.Module) -> None:
    """FSDP2 adds gradients up and does not divide: the loss was divided, which experts on one rank need as well."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else it multiplies by 1.0 on the way


def sharded_step(
    job: Job, loss_of: Callable[[Tensor], Tensor], optimizer: Optimizer, clip: Callable[[], None]
) -> Callable[[Tensor], Tensor]:
    """A step of a model whose gradients are sums over ranks."""

    def step(batch: Tensor) -> Tensor:
        loss = loss_of(batch)
        (loss / job.num_ranks).backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
