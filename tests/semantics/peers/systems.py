"""The strategies that are compared, made for two gloo ranks on CPUs, and the model that each of them trains."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins import DeepSpeedPrecision, FSDPPrecision
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.nn import functional as F

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.models import GPT, GPTConfig
from lightning_swiftmoe.models.gpt import Block
from tests.ranks import Ranks

NUM_EXPERTS = 4
PATIENCE = timedelta(minutes=10)  # of a collective: longer than that of a cell, so that what hangs is seen to hang


class FSDPOnCPU(FSDPStrategy):
    """Lightning's own is refused without a GPU, and torch's FSDP where no device is named; all else is as it is."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's own refuses to start without CUDA, though DeepSpeed trains on gloo ranks; all else is as it is."""

    @property
    def root_device(self) -> torch.device:
        """With a number, which DeepSpeed wants."""
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Without a look at the numbers of GPUs."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()


@dataclass(frozen=True)
class System:
    """A strategy.

    Args:
        name: on the command line.
        label: in the table.
        trainer: makes arguments of the Trainer: the strategy, plugins, precision.
        shards_model: the module itself calls ``fully_shard``, as ModelParallelStrategy wants it.
        bound: of differences from one process.
    """

    name: str
    label: str
    trainer: Callable[[], dict[str, Any]]
    shards_model: bool = False
    bound: float = 1e-6  # routers compute in 32 bits


def _alone() -> dict[str, Any]:
    return {"precision": "64-true"}


def _ours() -> dict[str, Any]:
    strategy = SwiftMoEStrategy(slots_per_rank=NUM_EXPERTS, timeout=PATIENCE)
    return {"strategy": strategy, "precision": "64-true"}


def _ddp() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo", timeout=PATIENCE), "precision": "64-true"}


def _fsdp() -> dict[str, Any]:
    # Full state dicts are copied to the host; what is there already torch frees, and then reads.
    FlatParamHandle.to_cpu = lambda handle: nullcontext()
    plugin = FSDPPrecision("32-true")
    plugin._desired_input_dtype = torch.float64  # it offers 32 bits at most, and casts nothing by itself
    strategy = FSDPOnCPU(
        auto_wrap_policy={Block}, mixed_precision=MixedPrecision(), process_group_backend="gloo", timeout=PATIENCE
    )
    return {"strategy": strategy, "plugins": [plugin]}


def _deepspeed() -> dict[str, Any]:
    import deepspeed

    # Compiled at the first start otherwise, for a call that only inference makes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPrecision("32-true")
    plugin._desired_dtype = torch.float64
    strategy = DeepSpeedOnCPU(stage=2, process_group_backend="gloo", timeout=PATIENCE)
    return {"strategy": strategy, "plugins": [plugin]}


def _model_parallel() -> dict[str, Any]:
    # All ranks hold data; by default those of one node would share tensors.
    strategy = ModelParallelStrategy(
        data_parallel_size=dist.get_world_size() if dist.is_initialized() else 2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo",
        timeout=PATIENCE,
    )
    return {"strategy": strategy, "precision": "32-true"}


ALONE = System("alone", "one process", _alone)
OURS = System("ours", "ours", _ours)
# ZeRO keeps master weights in 32 bits.
PEERS = [
    System("ddp", "DDP", _ddp),
    System("fsdp", "FSDP", _fsdp),
    System("deepspeed", "DeepSpeed", _deepspeed, bound=1e-4),
    System("model_parallel", "ModelParallel", _model_parallel, shards_model=True),
]
SYSTEMS = {system.name: system for system in (OURS, *PEERS)}


class Model(pl.LightningModule):
    """A GPT with two MoE blocks in 64 bits, and what a row wants compared besides its weights.

    Rows are subclasses. Auxiliary losses are off unless a row is about them: replicas see their own tokens only.

    Attributes:
        seen: numbers and tensors that must be those of one process.
    """

    moe: dict[str, Any] = {}  # noqa: RUF012
    width = 8
    leaves_unused = False  # parameters without a gradient in some backward, of which DDP wants to be told

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system
        torch.manual_seed(7)
        self.gpt = GPT(
            GPTConfig(
                vocab_size=20,
                max_seq_len=8,
                num_layers=2,
                hidden_size=self.width,
                num_heads=2,
                ffn_size=6,
                num_experts=NUM_EXPERTS,
                top_k=2,
                **{"aux_loss_coef": 0.0, **self.moe},
            )
        ).double()
        with torch.no_grad():
            for p in self.gpt.parameters():
                p.mul_(5)  # first weights are small, and so would be all differences
        self.moes = [block.ffn for block in self.gpt.blocks]
        self.seen: list[Any] = []

    @property
    def experts(self) -> list[nn.Parameter]:
        """Of all layers."""
        return [p for name, p in self.named_parameters() if "experts" in name]

    def configure_model(self) -> None:
        """What ModelParallelStrategy leaves to the module; once."""
        if self.system.shards_model and self.trainer.training and not hasattr(self, "_sharded"):
            self._sharded = True
            for part in (*self.gpt.blocks, self.gpt):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Of the next tokens, in 64 bits."""
        logits = self.gpt(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        """As users write it."""
        return self.loss(batch)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """As users write it."""
        self.log("val", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Momentum, so that what once went wrong stays wrong; a rate at which weights stay of order 1."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Batches:
    """A rank's part of every batch, in order; goes on where a checkpoint left off.

    Args:
        num_batches: in an epoch.
        rank: this one.
        num_ranks: that share a batch of 12 sequences.
    """

    def __init__(self, num_batches: int, rank: int, num_ranks: int) -> None:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, 20, (num_batches, 12, 9), generator=generator)
        tokens[:, :, ::2] %= 5  # something to learn
        self.batches = tokens.chunk(num_ranks, dim=1)[rank]
        self.next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        if self.next == len(self.batches):
            self.next = 0  # Lightning never asks for one more than there are
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self) -> dict[str, int]:
        """For Lightning's checkpoints."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """From there."""
        self.next = state["next"]


class SlurmRanks(SLURMEnvironment):
    """As ``Ranks``, under SLURM, whose wish to run a job again later Lightning then hears."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=True, requeue_signal=signal.SIGUSR1)

    world_size, set_world_size = Ranks.world_size, Ranks.set_world_size
    global_rank, set_global_rank = Ranks.global_rank, Ranks.set_global_rank
    local_rank, node_rank = Ranks.local_rank, Ranks.node_rank
    main_address, main_port = Ranks.main_address, Ranks.main_port
    creates_processes_externally = True

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing was asked of SLURM."""


def make_trainer(system: System, environment: type[ClusterEnvironment] = Ranks, **options: Any) -> pl.Trainer:
    """A Trainer on this rank, whose process group exists already; else Lightning starts ranks."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **system.trainer(),
        **options,
    }
    if dist.is_initialized():
        arguments["num_nodes"] = dist.get_world_size()
        arguments["plugins"] = [environment(), *arguments.get("plugins", [])]
    return pl.Trainer(**arguments)
