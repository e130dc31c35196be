"""DeepSpeed (0.19): its MoE layer with experts over all ranks, its engine, ZeRO-1, bf16.

Weights and layer are those of ``_deepspeed_peer``. The optimizer is torch's own, so that nothing has to be compiled.
``deepspeed`` drops nothing, whatever the model's capacity; ``deepspeed_cap1`` drops at capacity factor 1.0. Engine and
model are bf16 throughout (the residual stream too), with fp32 master weights in the optimizer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_swiftmoe.cli._deepspeed_peer import DeepSpeedFFN
from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter
from lightning_swiftmoe.cli._peers.plain import start_ranks, train
from lightning_swiftmoe.layers import MoE
from lightning_swiftmoe.models import GPT
from lightning_swiftmoe.models.language_module import decay_groups


def run(job: Job, meter: Meter) -> None:
    """Train."""
    warnings.simplefilter("ignore")
    start_ranks(job)
    check(job)
    gpt = job.build_replaying_gpt()
    with contextlib.redirect_stdout(io.StringIO()):  # a page of configuration from every rank
        layers, engine = build(gpt, job)
    survival = Survival(layers)
    meter.before_block, meter.survival = survival.stop, survival.value

    def step(batch: Tensor) -> Tensor:
        loss = gpt.loss(batch)
        engine.backward(loss)
        engine.step()
        return loss

    train(job, meter, step)


def check(job: Job) -> None:
    """Find what its layer cannot do alike.

    Raises:
        ValueError: a model that is not DeepSpeed's.
    """
    model = job.gpt
    expected = {
        "score": (model.score, "softmax"),
        "shared_ffn_size": (model.shared_ffn_size, 0),
        "aux_loss_coef": (model.aux_loss_coef, 0),
        "z_loss_coef": (model.z_loss_coef, 0),
        "bias_update_rate": (model.bias_update_rate, 0),
        "checkpoint_activations": (model.checkpoint_activations, False),
    }
    for key, (value, needed) in expected.items():
        if value != needed:
            raise ValueError(f"DeepSpeed is compared with model.{key}={needed}, got {value}")


def build(gpt: GPT, job: Job) -> tuple[list[nn.Module], Any]:
    """Put DeepSpeed's layers into ``gpt``; the gates and the engine. Collective."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    backend = dist.get_backend()
    if backend == "gloo":  # compiled at the first start otherwise, for a call that only inference makes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    gates = []
    capacity = 1.0 if job.name == "deepspeed_cap1" else None
    for block in gpt.blocks:
        if isinstance(block.ffn, MoE):
            with torch.device(job.device):
                block.ffn = DeepSpeedFFN(block.ffn, job.gpt, job.num_ranks, capacity, count=False)
            gates.append(block.ffn.moe.deepspeed_moe.gate)
    groups = [{**group, "name": str(number)} for number, group in enumerate(decay_groups(gpt))]
    if gates:
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    optimizer = job.make_optimizer([group for group in groups if group["params"]])
    settings = {
        "train_micro_batch_size_per_gpu": job.plan.batch_per_rank,
        "gradient_clipping": job.config.trainer.gradient_clip_val or 0.0,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": job.low_precision},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=gpt, optimizer=optimizer, config=settings)[0]
    return gates, engine


class Survival:
    """Counts what gates keep, in front of the timed block alone, since it costs kernels.

    Args:
        gates: of all MoE layers.
    """

    def __init__(self, gates: list[nn.Module]) -> None:
        self.kept: list[Tensor] = []
        self.hooks = [gate.register_forward_hook(self._count) for gate in gates]

    def _count(self, gate: nn.Module, args: Any, output: Any) -> None:
        experts = output[3]  # [K, T], -1 where dropped
        self.kept.append((experts >= 0).double().mean())

    def stop(self) -> None:
        """Count no more."""
        for hook in self.hooks:
            hook.remove()

    def value(self) -> float | None:
        """Share kept in the last step that was counted, on this rank."""
        return float(torch.stack(self.kept[-len(self.hooks) :]).mean()) if self.kept else None
