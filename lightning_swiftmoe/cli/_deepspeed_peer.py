"""The same GPT-MoE trained by DeepSpeed (0.19): its MoE layer, its engine, ZeRO-1, on gloo ranks of this machine.

Weights, data order, optimizer, schedule and clipping are those of ``swiftmoe train``. What stays DeepSpeed's own: the
gate (which tokens of an expert over its capacity it keeps), the load-balance loss (of each rank alone), and padding the
token exchange to the capacity. Tokens are dropped in batch order as far as its ``topk`` does (``use_rts=False``).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_swiftmoe.cli._measured import Measured, of_all_ranks, received_payload
from lightning_swiftmoe.cli._peers.replay import LayerReplay, ReplayedRouter
from lightning_swiftmoe.cluster import resolve_slots
from lightning_swiftmoe.layers import MoE
from lightning_swiftmoe.models import GPT, GPTConfig, GPTModule
from lightning_swiftmoe.models.gpt import DenseMLP
from lightning_swiftmoe.models.language_module import decay_groups, warmup_cosine


def check(config: DictConfig, model: GPTConfig) -> None:
    """Find what DeepSpeed's layer cannot do alike, before any rank starts.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: not gloo ranks of one machine, or a model, precision or placement that is not DeepSpeed's.
    """
    if find_spec("deepspeed") is None:
        raise ImportError(
            "peers=[deepspeed] needs the deepspeed package: "
            "DS_BUILD_OPS=0 pip install --no-build-isolation 'lightning-swiftmoe[deepspeed]'"
        )
    cluster, trainer = config.cluster, config.trainer
    if (cluster.accelerator, cluster.num_nodes, cluster.process_group_backend) != ("cpu", 1, "gloo"):
        raise ValueError("peers=[deepspeed] runs on gloo ranks of this machine: use cluster=local_cpu")
    expected = {
        "trainer.precision": (trainer.precision, "32-true"),
        "trainer.accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        "model.top_k": (model.top_k, 1),
        "model.score": (model.score, "softmax"),
        "model.z_loss_coef": (model.z_loss_coef, 0),
        "model.bias_update_rate": (model.bias_update_rate, 0),
        "model.shared_ffn_size": (model.shared_ffn_size, 0),
        "model.checkpoint_activations": (model.checkpoint_activations, False),
    }
    for key, (value, needed) in expected.items():
        if value != needed:
            raise ValueError(f"peers=[deepspeed] is compared with {key}={needed}, got {value}")
    expert_parallel_size(config, model)


def expert_parallel_size(config: DictConfig, model: GPTConfig) -> int:
    """Ranks that share one copy of all experts: ``E / s``, so that a rank holds as many experts as our slots.

    Raises:
        ValueError: slots that DeepSpeed cannot lay out.
    """
    num_ranks, num_experts = int(config.cluster.devices), model.num_experts
    slots = resolve_slots(config.strategy.slots_per_rank, num_experts, num_ranks)
    if num_experts % slots or num_ranks % (num_experts // slots):
        raise ValueError(
            f"DeepSpeed cannot put {num_experts} experts on {num_ranks} ranks with {slots} each: "
            "strategy.slots_per_rank must divide num_experts, and num_experts / slots_per_rank the number of ranks"
        )
    return num_experts // slots


def train_steps(config: DictConfig, model: GPTConfig, warmup: int, steps: int, extra: int) -> Measured:
    """Train ``warmup + steps + extra`` steps on ``cluster.devices`` ranks; what they measured of ``steps`` of them.

    The last ``extra`` only count for the learning rate's schedule.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank,
            (int(config.cluster.devices), folder, config, model, (warmup, steps, extra)),
            nprocs=int(config.cluster.devices),
            start_method="fork",  # as ours: the ranks start with everything loaded but DeepSpeed
        )
        return Measured.read(Path(folder, "measured.json"))


def _rank(
    rank: int, num_ranks: int, folder: str, config: DictConfig, model: GPTConfig, counts: tuple[int, int, int]
) -> None:
    torch.set_num_threads(1)
    # DeepSpeed asks for these even where a process group is there already.
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks))
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    with contextlib.redirect_stdout(io.StringIO()):  # a page of configuration from every rank
        measured = _train(config, model, *counts)
    if rank == 0:
        measured.write(Path(folder, "measured.json"))
    dist.destroy_process_group()


def _train(config: DictConfig, model: GPTConfig, warmup: int, steps: int, extra: int) -> Measured:
    gpt, layers, engine = build(config, model, warmup + steps + extra)
    seconds, losses, kept, routed = [], [], torch.zeros(steps), torch.zeros(steps)
    received = 0
    for index, batch in zip(range(warmup + steps), batches(config), strict=False):
        if index == warmup:
            received = received_payload()
        start = time.perf_counter()
        loss = gpt.loss(batch.long())
        engine.backward(loss + model.aux_loss_coef * sum((layer.aux_loss for layer in layers), torch.zeros(())))
        engine.step()
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
            losses.append(loss.detach())
            kept[index - warmup] = sum(layer.num_kept for layer in layers)
            routed[index - warmup] = sum(layer.num_routed for layer in layers)
    received = received_payload() - received
    sums = torch.stack([torch.stack(losses), kept, routed]).double()
    dist.all_reduce(sums)
    survival = sums[1] / sums[2] if layers else torch.zeros(0)
    mean_losses = sums[0] / dist.get_world_size()
    return Measured(seconds, mean_losses.tolist(), survival.tolist(), of_all_ranks(received / steps))


def build(config: DictConfig, model: GPTConfig, total_steps: int) -> tuple[GPT, list[DeepSpeedFFN], Any]:
    """The model with DeepSpeed's layers, those layers, and the engine. Collective, on a gloo group.

    Args:
        config: of ``swiftmoe train``.
        model: its sizes.
        total_steps: where the learning rate's cosine ends.
    """
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Compiled at the first start otherwise, for a call that only inference makes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    module: GPTModule = instantiate(config.module, model=model)
    gpt, layers = module.gpt, []
    for block in gpt.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn = DeepSpeedFFN(block.ffn, model, expert_parallel_size(config, model), block.ffn.capacity_factor)
            layers.append(block.ffn)
    groups = [{**group, "name": str(number)} for number, group in enumerate(decay_groups(gpt))]
    if layers:
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    optimizer = instantiate(config.optimizer)([group for group in groups if group["params"]])
    schedule = LambdaLR(
        optimizer, lambda step: warmup_cosine(step, module.warmup_steps, total_steps, module.min_lr_ratio)
    )
    settings = {
        "train_micro_batch_size_per_gpu": config.data.batch_size // dist.get_world_size(),
        "gradient_clipping": config.trainer.gradient_clip_val or 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=gpt, optimizer=optimizer, lr_scheduler=schedule, config=settings)[0]
    return gpt, layers, engine


def batches(config: DictConfig) -> Any:
    """This rank's batches in the order in which Lightning would deal them."""
    data = instantiate(config.data)
    data.trainer = SimpleNamespace(world_size=dist.get_world_size(), global_rank=dist.get_rank())
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


class DeepSpeedFFN(nn.Module):
    """DeepSpeed's MoE layer with the weights of ours, ``[..., d] -> [..., d]``.

    Args:
        ours: the layer it replaces, with all experts.
        config: sizes.
        ep_size: consecutive ranks that share one copy of all experts.
        capacity_factor: None drops nothing.
        count: note how many assignments are kept; the host then waits for the device.

    Attributes:
        aux_loss: of the last forward, over the tokens of this rank.
        num_routed, num_kept: assignments of the last forward on this rank, before and after drops.
    """

    def __init__(
        self, ours: MoE, config: GPTConfig, ep_size: int, capacity_factor: float | None, count: bool = True
    ) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        self.moe = DeepSpeedMoE(
            ours.hidden_size,
            DenseMLP(replace(config, ffn_size=ours.ffn_size)),
            num_experts=ours.num_experts,
            ep_size=ep_size,
            k=ours.top_k,
            capacity_factor=capacity_factor or 1.0,
            min_capacity=0,
            drop_tokens=capacity_factor is not None,
            use_rts=False,
            top2_2nd_expert_sampling=False,  # else its top-2 draws the second expert at random
        )
        layer = self.moe.deepspeed_moe
        layer.gate.wg.weight.data.copy_(ours.router.weight.data)
        local = list(layer.experts.deepspeed_experts)
        first = dist.get_rank() % ep_size * len(local)
        up = getattr(ours.experts, ours.experts.up_name)
        for number, expert in enumerate(local, start=first):
            expert.up.weight.data.copy_(up.data[number])
            expert.down.weight.data.copy_(ours.experts.down_proj.data[number])
        if isinstance(ours.router, ReplayedRouter):
            layer.gate = replayed_gate(layer.gate, ours.router.replay)
        if count:
            layer.gate.register_forward_hook(self._count)
        self.aux_loss = torch.zeros(())
        self.num_routed = self.num_kept = 0

    def forward(self, x: Tensor) -> Tensor:
        """As ``MoE``."""
        y, self.aux_loss, _ = self.moe(x)
        return y

    def _count(self, gate: nn.Module, args: Any, output: Any) -> None:
        experts = output[3]  # [1, T], -1 where dropped
        self.num_routed, self.num_kept = experts.numel(), int((experts >= 0).sum())


def replayed_gate(gate: Any, replay: LayerReplay) -> nn.Module:
    """DeepSpeed's gate with the weight and the settings of ``gate``, told where its tokens go."""
    from deepspeed.moe.sharded_moe import TopKGate, top1gating, top2gating, topkgating

    class ReplayedGate(TopKGate):
        """Its forward without noise and clocks, which have no part in training here."""

        def forward(
            self, input: Tensor, used_token: Any = None, sparse_routes: bool = False, use_tutel: bool = False
        ) -> Any:
            """Gates and places in the buffers of the experts, as ``TopKGate`` finds them from other logits."""
            logits = replay.prefer(nn.functional.linear(input.float(), self.wg.weight.float()))
            room = (self.capacity_factor, self.min_capacity)
            drops = (self.drop_tokens, self.ep_group)
            if self.k == 1:
                dropped, ranks = drops
                return top1gating(
                    logits, *room, used_token, None, dropped, self.use_rts, ranks, sparse_routes, use_tutel
                )
            if self.k == 2:
                return top2gating(logits, *room, *drops, self.top2_2nd_expert_sampling, sparse_routes)
            return topkgating(logits, self.k, *room, *drops, sparse_routes=sparse_routes)

    found = ReplayedGate(
        gate.wg.in_features,
        gate.wg.out_features,
        gate.k,
        gate.capacity_factor,
        min_capacity=gate.min_capacity,
        drop_tokens=gate.drop_tokens,
        use_rts=gate.use_rts,
        top2_2nd_expert_sampling=gate.top2_2nd_expert_sampling,
    )
    found.wg = gate.wg
    return found
