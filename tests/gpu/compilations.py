"""Which kernels Triton compiles, and in which step."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from tests.gpu.cases import GpuJob, fit
from tests.gpu.waits import Quiet

SIZES = [0, 1, 15, 16, 17, 127, 128, 129, 300, 511, 512, 513]


class Wandering(Quiet):
    """The router prefers other experts in every step, and some get nothing; needs ``bias_update_rate``."""

    def on_train_batch_start(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(batch_idx)
        for moe in self.moes:
            bias = moe.router.expert_bias
            bias.copy_(3 * torch.randn(bias.shape, generator=generator))


class Compilations(pl.Callback):
    """``(step, kernel)`` of everything that Triton compiles, or reads from its cache on disk, during a fit."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []
        self._step = -1

    def setup(self, trainer, pl_module, stage):
        try:
            import triton
        except ImportError:
            return
        triton.knobs.runtime.jit_cache_hook = self._note

    def teardown(self, trainer, pl_module, stage):
        try:
            import triton
        except ImportError:
            return
        triton.knobs.runtime.jit_cache_hook = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._step = batch_idx

    def _note(self, **hook) -> bool:
        self.seen.append((self._step, str(hook.get("repr"))))
        return False


def ragged(num_steps: int, rank: int) -> list[int]:
    """Tokens of this rank by step: the first are the most, later ones anything."""
    rng = random.Random(rank)
    return [600, *(rng.choice(SIZES) if rng.random() < 0.5 else rng.randrange(600) for _ in range(num_steps - 1))]


def compiled_by_step(job: GpuJob) -> list[tuple[int, str]]:
    """Train on batches of all sizes."""
    watch = Compilations()
    job.sizes = ragged(job.steps, dist.get_rank())
    fit(job, callbacks=[watch])
    return watch.seen
