"""What one rank of one system is told: files in a folder, since ranks are other processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data.distributed import DistributedSampler

from lightning_swiftmoe.cli._models import gpt_of, model_of
from lightning_swiftmoe.cli._peers.replay import Replay, ReplayedRouter
from lightning_swiftmoe.data.text import TextData
from lightning_swiftmoe.layers.model_sizes import DescribedModel
from lightning_swiftmoe.layers.moe import moe_layers
from lightning_swiftmoe.models import GPT, GPTConfig
from lightning_swiftmoe.models.language_module import decay_groups

PROFILER_WARMUP = 1  # steps under the profiler that are thrown away: its first one is slow


@dataclass(frozen=True)
class Plan:
    """What is measured, the same for all systems.

    Args:
        warmup: steps before the timed block.
        steps: steps of the timed block.
        profiled: steps under the profiler, behind it; 0: none.
        stacks: whether the profiler also notes which line of Python asked for what (slower).
        batch_per_rank: sequences of one step on one rank.
        reshard: whether FSDP2 frees gathered parameters behind the forward pass.
        batches: a file of ``write_batches`` to train on; None: made-up tokens.
        replay: a file of ``write_replay`` that says where tokens go; None: the router does.
    """

    warmup: int
    steps: int
    profiled: int
    stacks: bool
    batch_per_rank: int
    reshard: bool
    batches: str | None = None
    replay: str | None = None

    @property
    def total_steps(self) -> int:
        """All steps that are trained."""
        return self.warmup + self.steps + (self.profiled + PROFILER_WARMUP if self.profiled else 0)


@dataclass(frozen=True)
class Job:
    """One rank of one system.

    Args:
        name: the system, a key of ``systems.PEERS``.
        rank, num_ranks: of this process.
        config: of ``swiftmoe train``, for this system.
        plan: what is measured.
        folder: where results go.
    """

    name: str
    rank: int
    num_ranks: int
    config: DictConfig
    plan: Plan
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", self.rank) if self.config.cluster.accelerator == "gpu" else torch.device("cpu")

    @cached_property
    def model(self) -> DescribedModel:
        """Which model."""
        return model_of(self.config)

    @property
    def gpt(self) -> GPTConfig:
        """Its sizes, for a peer that knows no other.

        Raises:
            ValueError: it is another model.
        """
        return gpt_of(self.config)

    @property
    def low_precision(self) -> bool:
        """Whether matrix products run in bf16 above fp32 master weights.

        Raises:
            ValueError: a precision for which the systems have no common meaning.
        """
        precision = str(self.config.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"peers are compared with trainer.precision=32-true or bf16-mixed, got {precision}")
        return precision == "bf16-mixed"

    def build_gpt(self) -> GPT:
        """The model with the weights that all systems start from, on this rank's device.

        Drawn on the device: a billion parameters take a second there and half a minute on one core.
        """
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(self.config.seed)
            return GPT(self.gpt)

    def build_replaying_gpt(self) -> GPT:
        """The same, and its routing as the plan wants it."""
        gpt = self.build_gpt()
        self.replay_routing(gpt)
        return gpt

    def replay_routing(self, gpt: GPT) -> None:
        """From now on tokens go where the plan's trace says; nothing changes without one."""
        if self.plan.replay is None:
            return
        replay = Replay.read(self.plan.replay, self.rank, self.device)
        for number, layer in enumerate(moe_layers(gpt).values()):
            layer.router = ReplayedRouter(layer.router, replay.layer(number))

    def build_optimizer(self, model: torch.nn.Module) -> Optimizer:
        """The configured optimizer over ``decay_groups``."""
        return self.make_optimizer([group for group in decay_groups(model) if group["params"]])

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The configured optimizer over these groups."""
        return instantiate(self.config.optimizer)(groups)

    def batches(self) -> list[Tensor]:
        """This rank's ``[B, T + 1]`` tokens of every step, on its device before the first one."""
        batch, length = self.plan.batch_per_rank, self.config.data.seq_len + 1
        if self.plan.batches is not None:
            read = np.load(self.plan.batches, mmap_mode="r")[:, self.rank * batch : (self.rank + 1) * batch]
            return list(torch.from_numpy(read.astype(np.int64)).to(self.device))
        generator = torch.Generator().manual_seed(self.config.seed)
        vocab = self.model.describe().sizes.vocab_size
        shape = (self.num_ranks * batch, length)
        mine = slice(self.rank * batch, (self.rank + 1) * batch)
        every = [made_up_text(shape, vocab, generator)[mine] for _ in range(self.plan.total_steps)]
        return list(torch.stack(every).to(self.device))

    def write(self) -> None:
        """For ``read`` in the rank's process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "config.yaml")
        told = {"name": self.name, "num_ranks": self.num_ranks, "plan": asdict(self.plan)}
        (self.folder / "job.json").write_text(json.dumps(told))

    @classmethod
    def read(cls, folder: Path, rank: int) -> Job:
        """What ``write`` wrote."""
        told: dict[str, Any] = json.loads((folder / "job.json").read_text())
        config = OmegaConf.load(folder / "config.yaml")
        assert isinstance(config, DictConfig)
        return cls(told["name"], rank, told["num_ranks"], config, Plan(**told["plan"]), folder)


def write_batches(path: Path, config: DictConfig, plan: Plan, num_ranks: int) -> None:
    """The configured data's training batches of all steps and ranks, ``[steps, B, T + 1]``, shuffled as in training.

    Read and encoded once, for all systems.
    """
    data: TextData = instantiate(config.data)
    data.batch_size = num_ranks * plan.batch_per_rank
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    found: list[Tensor] = []
    while len(found) < plan.total_steps:
        before = len(found)
        found += islice(loader, plan.total_steps - before)
        if len(found) == before:
            raise ValueError(f"the text is too short for one batch of {data.batch_size} sequences")
        loader.sampler.set_epoch(loader.sampler.epoch + 1)
    np.save(path, torch.stack(found).numpy())


def made_up_text(shape: tuple[int, int], vocab: int, generator: torch.Generator) -> Tensor:
    """Tokens with something to learn: some are frequent, and every second one follows from the one before it."""
    uniform = torch.rand(shape, generator=generator)
    tokens = (vocab * uniform**3).long().clamp_(max=vocab - 1)
    followers = tokens[:, 1::2]
    followers.copy_((tokens[:, 0::2][:, : followers.shape[1]] * 7 + 3) % vocab)
    return tokens
