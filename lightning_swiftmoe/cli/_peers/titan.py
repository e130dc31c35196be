"""torchtitan (0.2): its MoE layer with ExpertParallel over all ranks, FSDP2 for the rest, in our blocks.

Set up as torchtitan's own ``parallelize`` does: experts on the ``ep`` axis and, on an axis of size 1, under FSDP2 for
their precision; everything else in units of a block; prefetching said explicitly. Gate weights are applied to the
experts' outputs, as ours are (``score_before_experts=False``). Its router multiplies in bf16, ours in fp32.
"""

from __future__ import annotations

import logging
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter
from lightning_swiftmoe.cli._peers.plain import precision_policy, sharded_step, start_ranks, sum_gradients, train
from lightning_swiftmoe.cli._peers.replay import ReplayedLinear, ReplayedRouter
from lightning_swiftmoe.layers import MoE
from lightning_swiftmoe.models import GPT


def run(job: Job, meter: Meter) -> None:
    """Train."""
    logging.getLogger().setLevel(logging.ERROR)  # it logs through the root logger
    start_ranks(job)
    if job.device.type == "cpu":
        make_do_without_cuda()
    gpt = job.build_replaying_gpt()
    check(gpt)
    for block in gpt.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn = titan_moe(block.ffn, job)
    parallelize(gpt, job)
    optimizer = job.build_optimizer(gpt)
    meter.survival = lambda: 1.0  # it knows no capacity
    train(job, meter, sharded_step(job, gpt.loss, optimizer, make_clip(gpt, job)))


def check(gpt: GPT) -> None:
    """Find what its layer cannot do alike.

    Raises:
        ValueError: a model that is not torchtitan's.
    """
    config = gpt.config
    expected = {
        "activation": (config.activation, "swiglu"),
        "capacity_factor": (config.capacity_factor, None),
        "shared_ffn_size": (config.shared_ffn_size, 0),
        "aux_loss_coef": (config.aux_loss_coef, 0),
        "z_loss_coef": (config.z_loss_coef, 0),
        "bias_update_rate": (config.bias_update_rate, 0),
    }
    for key, (value, needed) in expected.items():
        if value != needed:
            raise ValueError(f"torchtitan is compared with model.{key}={needed}, got {value}")


def titan_moe(ours: MoE, job: Job) -> nn.Module:
    """torchtitan's layer with the weights of ``ours``, ``[B, T, d] -> [B, T, d]``."""
    from torchtitan.models.moe import MoE as TitanMoE
    from torchtitan.models.moe import MoEArgs

    settings = MoEArgs(
        num_experts=ours.num_experts,
        num_shared_experts=0,
        score_func=ours.router.score,  # type: ignore[arg-type]
        route_norm=ours.router.normalize_topk,
        score_before_experts=False,
        top_k=ours.top_k,
        use_grouped_mm=job.low_precision,  # which is for bf16 alone
        load_balance_coeff=None,
    )
    with torch.device(job.device):
        layer = TitanMoE(settings, dim=ours.hidden_size, hidden_dim=ours.ffn_size)
    gate, up = getattr(ours.experts, ours.experts.up_name).detach().chunk(2, dim=1)
    sources = {"w1": gate, "w3": up, "w2": ours.experts.down_proj.detach()}
    with torch.no_grad():
        layer.router.gate.weight.copy_(ours.router.weight)
        for name, source in sources.items():
            getattr(layer.experts, name).copy_(source)
    if isinstance(ours.router, ReplayedRouter):
        layer.router.gate = ReplayedLinear(layer.router.gate, ours.router.replay)
    return layer


def parallelize(gpt: GPT, job: Job) -> None:
    """Experts over all ranks, the rest under FSDP2."""
    from torchtitan.distributed.expert_parallel import ExpertParallel

    kind, policy, reshard = job.device.type, precision_policy(job), job.plan.reshard
    dense_mesh = init_device_mesh(kind, (job.num_ranks,), mesh_dim_names=("fsdp",))
    expert_mesh = init_device_mesh(kind, (1, job.num_ranks), mesh_dim_names=("efsdp", "ep"))
    for block in gpt.blocks:
        if experts := experts_of(block):
            parallelize_module(experts[0], expert_mesh["ep"], ExpertParallel())
            fully_shard(experts[0], mesh=expert_mesh["efsdp"], mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(block, mesh=dense_mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(gpt, mesh=dense_mesh, mp_policy=policy)
    sum_gradients(gpt)
    prefetch(list(gpt.blocks))


def experts_of(block: Any) -> list[nn.Module]:
    """The expert weights of a block: none where it is dense."""
    return [block.ffn.experts] if hasattr(block.ffn, "experts") else []


def prefetch(blocks: list[Any]) -> None:
    """The neighbour of each block, since waits of the host inside the exchange defeat FSDP2's own guess."""
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following, *experts_of(following)])
        following.set_modules_to_backward_prefetch([block, *experts_of(block)])


def make_clip(gpt: GPT, job: Job) -> Any:
    """torchtitan's own clipping, which knows that experts live on another mesh."""
    limit = job.config.trainer.gradient_clip_val or 0.0
    if not limit:
        return lambda: None
    from torchtitan.distributed.utils import clip_grad_norm_

    return lambda: clip_grad_norm_(gpt.parameters(), limit, ep_enabled=True)


def make_do_without_cuda() -> None:
    """On a CPU, for tests: its layer asks for a Triton kernel and for histograms of integers."""
    from torchtitan.models.moe import utils

    utils.generate_permute_indices = partial(utils.generate_permute_indices, use_cpu=True)
    histogram = torch.histc

    def histc(values: Tensor, **bins: Any) -> Tensor:
        return histogram(values.float(), **bins).to(values.dtype)

    torch.histc = histc  # type: ignore[assignment]
